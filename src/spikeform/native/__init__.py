"""What runs below PyTorch: a small compiled library for the CPU, and the operators that stand for fused kernels."""

from spikeform.native.library import library, why
from spikeform.native.operators import define, fixed

__all__ = ["define", "fixed", "library", "why"]
