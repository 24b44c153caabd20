"""The errors that spikeform raises on purpose.

Each message names what is wrong and what to do about it. They are all ``ValueError``s, so code that knows
nothing of spikeform can still catch them; the command line prints the message alone and exits with code 2.
"""


class SpikeformError(ValueError):
    """Anything that spikeform refuses: a bad input, with a message meant for the person who gave it."""


class ConfigError(SpikeformError):
    """A method's configuration is wrong: a value out of range, an unknown key, clashing options."""


class CalibrationError(SpikeformError):
    """The calibration data cannot be used: no text, or text longer than the model's context."""


class ConversionError(SpikeformError):
    """The model cannot be converted: it already is, or nothing in it can become spiking."""


class CheckpointError(SpikeformError):
    """A folder cannot be read or written as a checkpoint."""


class ForeignFolderError(CheckpointError):
    """A path holds something else than was asked for: no model, a dense model, or files that are not ours."""


class NewerFormatError(CheckpointError):
    """A checkpoint was written by a later spikeform than this one."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint's files or tensors are not those that were saved.

    Attributes:
        problems: one line per damage found, each naming the file or the tensor.
    """

    def __init__(self, message: str, problems: tuple[str, ...] = ()):
        super().__init__(message)
        self.problems = problems
