"""Reports: which neuron sits where, speed beside the dense model, raster plots of literal spikes, tables."""

from spikeform.report.bench import Bench, Speed, bench
from spikeform.report.inspect import inspect
from spikeform.report.raster import Raster, raster
from spikeform.report.tables import lines, show, to_json

__all__ = ["Bench", "Raster", "Speed", "bench", "inspect", "lines", "raster", "show", "to_json"]
