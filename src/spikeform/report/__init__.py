"""Reports: which neuron sits where, raster plots of literal spikes, tables for terminals and machines."""

from spikeform.report.inspect import inspect
from spikeform.report.raster import Raster, raster
from spikeform.report.tables import lines, show, to_json

__all__ = ["Raster", "inspect", "lines", "raster", "show", "to_json"]
