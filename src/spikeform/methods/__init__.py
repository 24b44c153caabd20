"""The conversion methods. Importing this package registers each with transformers."""

from spikeform.methods.las import LAS

__all__ = ["LAS"]
