"""spikeform: turn pretrained Hugging Face language models into spiking ones, run them, and say what they cost.

Importing it is cheap: nothing heavy is loaded until a name is used. It makes converted checkpoints loadable by
transformers, now or whenever transformers is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spikeform import _plugin

if TYPE_CHECKING:
    from spikeform.checkpoint import load as load
    from spikeform.checkpoint import save as save
    from spikeform.checkpoint import verify as verify
    from spikeform.conversion import ConversionReport as ConversionReport
    from spikeform.conversion import convert as convert
    from spikeform.conversion import set_steps as set_steps
    from spikeform.conversion import set_weight_bits as set_weight_bits
    from spikeform.conversion import tune as tune
    from spikeform.energy import energy as energy
    from spikeform.evaluation import fidelity as fidelity
    from spikeform.evaluation import perplexity as perplexity
    from spikeform.evaluation import zeroshot as zeroshot
    from spikeform.layers.compiled import compile_config as compile_config
    from spikeform.methods import FAS as FAS
    from spikeform.methods import LAS as LAS
    from spikeform.methods import CalibrateOptions as CalibrateOptions
    from spikeform.methods import NeuTransformer as NeuTransformer
    from spikeform.methods import SpikeLLM as SpikeLLM
    from spikeform.methods import SpikingMamba as SpikingMamba
    from spikeform.methods import calibrate as calibrate
    from spikeform.neurons import fit_few_spike as fit_few_spike
    from spikeform.report import inspect as inspect
    from spikeform.report import raster as raster
    from spikeform.spikes import SpikeTrain as SpikeTrain
    from spikeform.synapses import executor as executor
    from spikeform.training import TrainOptions as TrainOptions
    from spikeform.training import train as train
    from spikeform.training.preference import PairOptions as PairOptions
    from spikeform.training.preference import PreferOptions as PreferOptions
    from spikeform.training.preference import load_pairs as load_pairs
    from spikeform.training.preference import prefer as prefer
    from spikeform.training.preference import preference_pairs as preference_pairs

__version__ = "0.1.0"

_HOMES = {
    "CalibrateOptions": "spikeform.methods",
    "ConversionReport": "spikeform.conversion",
    "FAS": "spikeform.methods",
    "LAS": "spikeform.methods",
    "NeuTransformer": "spikeform.methods",
    "PairOptions": "spikeform.training.preference",
    "PreferOptions": "spikeform.training.preference",
    "SpikeLLM": "spikeform.methods",
    "SpikeTrain": "spikeform.spikes",
    "SpikingMamba": "spikeform.methods",
    "TrainOptions": "spikeform.training",
    "calibrate": "spikeform.methods",
    "compile_config": "spikeform.layers.compiled",
    "convert": "spikeform.conversion",
    "energy": "spikeform.energy",
    "executor": "spikeform.synapses",
    "fidelity": "spikeform.evaluation",
    "fit_few_spike": "spikeform.neurons",
    "inspect": "spikeform.report",
    "load": "spikeform.checkpoint",
    "load_pairs": "spikeform.training.preference",
    "perplexity": "spikeform.evaluation",
    "prefer": "spikeform.training.preference",
    "preference_pairs": "spikeform.training.preference",
    "raster": "spikeform.report",
    "save": "spikeform.checkpoint",
    "set_steps": "spikeform.conversion",
    "set_weight_bits": "spikeform.conversion",
    "train": "spikeform.training",
    "tune": "spikeform.conversion",
    "verify": "spikeform.checkpoint",
    "zeroshot": "spikeform.evaluation",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'spikeform' has no attribute {name!r}")
    importlib.import_module("spikeform.methods")  # registers the methods
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


_plugin.install()
