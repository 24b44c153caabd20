"""FAS (arXiv 2502.04405): fine-tune with QCFS activations, then calibrate the spiking network from coarse to fine."""

from spikeform.conversion import Method, register
from spikeform.methods.fas.calibrate import CalibrateOptions, calibrate
from spikeform.methods.fas.config import FAS
from spikeform.methods.fas.convert import prepare
from spikeform.methods.fas.thresholds import fit, given

register(Method("fas", FAS, prepare, given, fit, core=("linear", "activation"), trainable=True, streams=True))

__all__ = ["FAS", "CalibrateOptions", "calibrate"]
