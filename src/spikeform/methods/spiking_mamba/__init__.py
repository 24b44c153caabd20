"""SpikingMamba (arXiv 2510.04595): signed-integer neurons before Mamba's projections, distilled from itself."""

from spikeform.conversion import Method, register
from spikeform.conversion.weights import finish, skeleton
from spikeform.methods.spiking_mamba.config import SpikingMamba
from spikeform.methods.spiking_mamba.convert import prepare
from spikeform.methods.spiking_mamba.thresholds import fit, given

register(
    Method(
        "spiking_mamba",
        SpikingMamba,
        prepare,
        given,
        fit,
        trainable=True,
        skeleton=skeleton(prepare),
        finish=finish,
    )
)

__all__ = ["SpikingMamba", "fit", "given", "prepare"]
