"""SpikeLLM (arXiv 2407.04752): saliency decides which channels spike in more steps."""

from spikeform.conversion import Method, register
from spikeform.methods.spikellm.calibrate import calibrate
from spikeform.methods.spikellm.config import SpikeLLM
from spikeform.methods.spikellm.convert import finish, prepare, skeleton
from spikeform.methods.spikellm.reshape import reshape

register(Method("spikellm", SpikeLLM, prepare, skeleton=skeleton, reshape=reshape, calibrate=calibrate, finish=finish))

__all__ = ["SpikeLLM", "prepare"]
