"""Synapses: spike trains (and a weight) in, a real tensor out. One meaning, three executors side by side."""

from spikeform.synapses.dispatch import EXECUTORS, executor, explain
from spikeform.synapses.products import hadamard, linear, matmul

__all__ = ["EXECUTORS", "executor", "explain", "hadamard", "linear", "matmul"]
