"""The parts of calibration: options, data, losses, the loop of its stages, its state on disk."""
