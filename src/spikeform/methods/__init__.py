"""Methods: where neurons sit, and how their parameters are found. Importing this registers them all."""

from spikeform.methods.fas import FAS, CalibrateOptions, calibrate
from spikeform.methods.las import LAS
from spikeform.methods.neutransformer import NeuTransformer
from spikeform.methods.spikellm import SpikeLLM
from spikeform.methods.spiking_mamba import SpikingMamba

__all__ = ["FAS", "LAS", "CalibrateOptions", "NeuTransformer", "SpikeLLM", "SpikingMamba", "calibrate"]
