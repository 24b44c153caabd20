"""NeuTransformer (arXiv 2510.00133): spiking self-attention in a trained transformer, fine-tuned."""

from spikeform.conversion import Method, register
from spikeform.methods.neutransformer.calibrate import calibrate
from spikeform.methods.neutransformer.config import NeuTransformer
from spikeform.methods.neutransformer.convert import prepare

register(
    Method(
        "neutransformer",
        NeuTransformer,
        prepare,
        core=("attention",),
        trainable=True,
        calibrate=calibrate,
    )
)

__all__ = ["NeuTransformer", "calibrate", "prepare"]
