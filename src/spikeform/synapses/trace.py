"""Moved: see :mod:`spikeform.spikes.trace`."""

from spikeform.spikes.trace import Firing, Product, observe, observer

__all__ = ["Firing", "Product", "observe", "observer"]
