"""Neurons on the CPU: the compiled library where there is one, else the neurons' own PyTorch code."""
