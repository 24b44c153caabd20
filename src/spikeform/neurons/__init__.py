"""Neurons: a real tensor in, a spike train out. One neuron a file, its equation in the docstring."""

from spikeform.neurons.dynamic import Dynamic
from spikeform.neurons.few_spike import FewSpikeHG, few_spike_bank
from spikeform.neurons.few_spike_fit import fit_few_spike
from spikeform.neurons.functions import FUNCTIONS
from spikeform.neurons.gif import GIF
from spikeform.neurons.hg import FixedPointHG
from spikeform.neurons.neuron import Neuron, ThresholdNeuron, recording, unseen
from spikeform.neurons.oat import MT, OAT, ROUNDINGS
from spikeform.neurons.signed_integer import Compensation, SignedInteger
from spikeform.neurons.streaming import Clock, StreamingNeuron

__all__ = [
    "FUNCTIONS",
    "GIF",
    "MT",
    "OAT",
    "ROUNDINGS",
    "Clock",
    "Compensation",
    "Dynamic",
    "FewSpikeHG",
    "FixedPointHG",
    "Neuron",
    "SignedInteger",
    "StreamingNeuron",
    "ThresholdNeuron",
    "few_spike_bank",
    "fit_few_spike",
    "recording",
    "unseen",
]
