"""Training: one loop for every method that learns, over files of text, on one device or several."""

from spikeform.conversion.record import entry
from spikeform.training.errors import Interrupted, TrainingError
from spikeform.training.options import TrainOptions
from spikeform.training.train import train

__all__ = ["Interrupted", "TrainOptions", "TrainingError", "entry", "train"]
