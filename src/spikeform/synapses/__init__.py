"""Synapses: spike trains (and a weight) in, a real tensor out. One meaning, three executors side by side."""

from spikeform.synapses.dispatch import EXECUTORS, executor, explain, forced, fusible
from spikeform.synapses.integer import IntegerWeight
from spikeform.synapses.products import hadamard, linear, matmul
from spikeform.synapses.sums import exact_sums, explain_sums

__all__ = [
    "EXECUTORS",
    "IntegerWeight",
    "exact_sums",
    "executor",
    "explain",
    "explain_sums",
    "forced",
    "fusible",
    "hadamard",
    "linear",
    "matmul",
]
