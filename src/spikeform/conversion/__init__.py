"""Conversion: the walk over a model, calibration, the report, and the Hugging Face quantizer."""

from spikeform.conversion.convert import convert, is_converted, set_steps, set_weight_bits
from spikeform.conversion.quantizer import register
from spikeform.conversion.registry import Method, config_from_dict, method_of
from spikeform.conversion.report import ConversionReport, Row
from spikeform.conversion.tuning import Choice, tune

__all__ = [
    "Choice",
    "ConversionReport",
    "Method",
    "Row",
    "config_from_dict",
    "convert",
    "is_converted",
    "method_of",
    "register",
    "set_steps",
    "set_weight_bits",
    "tune",
]
