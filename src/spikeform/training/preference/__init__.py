"""Preference tuning of spiking models through TRL: pairs, DPO and KTO, and what they are judged by."""

from spikeform.training.preference.build import preference_pairs
from spikeform.training.preference.measures import Ranking, mcnemar, rank, wilson
from spikeform.training.preference.options import PairOptions, PreferOptions
from spikeform.training.preference.pairs import Pairs, load_pairs
from spikeform.training.preference.tune import prefer

__all__ = [
    "PairOptions",
    "Pairs",
    "PreferOptions",
    "Ranking",
    "load_pairs",
    "mcnemar",
    "prefer",
    "preference_pairs",
    "rank",
    "wilson",
]
