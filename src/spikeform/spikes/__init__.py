"""Ground floor: what a spike train is, and how codes unroll into spikes. Imports torch alone."""

from spikeform.spikes.codings import (
    CODINGS,
    Burst,
    Coding,
    MultiThreshold,
    Radix2,
    SignedDigit,
    Thermometer,
)
from spikeform.spikes.train import SpikeTrain, narrowest, power_of_two

__all__ = [
    "CODINGS",
    "Burst",
    "Coding",
    "MultiThreshold",
    "Radix2",
    "SignedDigit",
    "SpikeTrain",
    "Thermometer",
    "narrowest",
    "power_of_two",
]
