"""LAS (arXiv 2505.09659): lossless conversion with outlier-aware and hierarchically gated neurons."""

from spikeform.conversion import Method, register
from spikeform.conversion.weights import finish, skeleton
from spikeform.methods.las.config import LAS
from spikeform.methods.las.convert import prepare
from spikeform.methods.las.thresholds import fit, given

register(Method("las", LAS, prepare, given, fit, skeleton=skeleton(prepare), finish=finish))

__all__ = ["LAS", "fit", "prepare"]
