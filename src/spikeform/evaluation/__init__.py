"""Evaluation: how close a spiking model is to the dense one, and how good it is by itself.

Works on any Hugging Face causal language model, dense or converted. See docs/evaluation.md.
"""

from spikeform.evaluation.classification import ClassificationAgreement, classification_agreement
from spikeform.evaluation.fidelity import Fidelity, fidelity
from spikeform.evaluation.labelled import labelled_batches, load_labelled
from spikeform.evaluation.perplexity import PerplexityResult, perplexity
from spikeform.evaluation.text import data_root, load_text, sample_ids, tokenize
from spikeform.evaluation.zeroshot import available_tasks, zeroshot

__all__ = [
    "ClassificationAgreement",
    "Fidelity",
    "PerplexityResult",
    "available_tasks",
    "classification_agreement",
    "data_root",
    "fidelity",
    "labelled_batches",
    "load_labelled",
    "load_text",
    "perplexity",
    "sample_ids",
    "tokenize",
    "zeroshot",
]
