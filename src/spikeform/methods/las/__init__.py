"""LAS (arXiv 2505.09659): lossless conversion with outlier-aware and hierarchically gated neurons."""

from spikeform.conversion import Method, register
from spikeform.methods.las.config import LAS
from spikeform.methods.las.convert import prepare
from spikeform.methods.las.thresholds import fit, given
from spikeform.methods.las.weights import finish, skeleton

register(Method("las", LAS, prepare, given, fit, skeleton=skeleton, finish=finish))

__all__ = ["LAS", "fit", "prepare"]
