"""Layers: a neuron and a synapse under the name and the parameters of the module they replace."""

from spikeform.layers.attention import SpikingAttention
from spikeform.layers.coded import CodedLinear
from spikeform.layers.feedforward import SpikingActivation, SpikingGatedMLP
from spikeform.layers.linear import SpikingLinear
from spikeform.layers.norm import SpikingNorm

__all__ = ["CodedLinear", "SpikingActivation", "SpikingAttention", "SpikingGatedMLP", "SpikingLinear", "SpikingNorm"]
