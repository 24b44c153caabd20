"""Tables of allocations, weights and ESTIMATED energy of SpikeLLM. Called by spikellm_tables.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fas_costs import table

MODELS = ("llama", "gpt2", "opt")
Rows = dict[tuple[str, str], dict[str, Any]]
Show = Callable[[str, str], str]
FIRST = """ACE and spikes are those of llama. At equal operations a share by measured error (`sensitivity`) is the best
allocation; that and the others lie within 1% of the fixed share. The official levels, shared masks and 8-bit
probabilities change next to nothing. Learning is worth far more than which channels (RTN beside OmniQuant), and so are
separate ranges where nothing is learned: 45.25, what trained OmniQuant has at T = 1."""
USABLE = 10  # times the dense perplexity
COST_MODELS = ("45nm-fp32", "45nm-fp16", "45nm-int8")
RATIOS = ("vs_dense", "vs_quantised", "vs_dense_with_memory", "vs_quantised_with_memory")

OTHERS = (
    ("spikellm-t2", "as above: OmniQuant, a tenth of each layer (`fraction`), unified, a mask a layer"),
    ("t2-budget", "`budget`: the best channels of the model"),
    ("t2-sensitivity", "`sensitivity`: a share by layer, by its measured error"),
    ("t2-energy", "`energy`: saliency by expected spike; ACE is not held"),
    ("t2-official", "`official` form: 31 levels for salient channels"),
    ("t2-shared-masks", "one mask for layers of one input"),
    ("p8", "8-bit probabilities"),
    ("gptq-t2-rotated", "GPTQ in place of OmniQuant, rotated"),
    ("rtn-t2", "RTN: nothing learned, OBS"),
    ("rtn-t2-unsigned", "RTN, OBS, unsigned spikes"),
    ("rtn-t2-magnitude", "RTN, largest magnitudes"),
    ("rtn-t2-random", "RTN, random channels"),
    ("rtn-t2-magnitude-separate", "RTN, largest magnitudes, separate ranges"),
)
WEIGHTS = (
    ("gptq-w2a16", "GPTQ, 2 bits"),
    ("swept-gptq-w2a16", "GPTQ + sweeps, 2 bits"),
    ("gptq-w2a16-random", "GPTQ, 2 bits, T = 2 for 10% at random"),
    ("spikellm-gptq-w2a16-plain", "SpikeLLM, GPTQ, 2 bits, T = 2 for 10%"),
    ("spikellm-gptq-w2a16", "SpikeLLM, GPTQ + sweeps, 2 bits, T = 2 for 10%"),
    ("gptq-w3a16", "GPTQ, 3 bits"),
    ("gptq-ternary", "GPTQ, ternary"),
    ("gptq-ternary-random", "GPTQ, ternary, T = 2 for 40% at random"),
    ("swept-ternary-random", "GPTQ + sweeps, ternary, T = 2 for 40% at random"),
    ("spikellm-ternary-plain", "SpikeLLM, GPTQ, ternary, T = 2 for 40%"),
    ("spikellm-ternary", "SpikeLLM, GPTQ + sweeps, ternary, T = 2 for 40%"),
    ("pb-llm-95", "PB-LLM-like, 95% binary"),
    ("pb-llm-90", "PB-LLM-like, 90% binary"),
    ("omniquant-w2a16", "OmniQuant W2A16"),
    ("spikellm-w2a16", "SpikeLLM, OmniQuant, W2A16, T = 2 for 10%"),
    ("omniquant-w2a8", "OmniQuant W2A8"),
    ("spikellm-w2a8", "SpikeLLM, OmniQuant, W2A8, weights T = 2 for 10%, activations for 5%"),
)
ENERGY = (
    ("rtn-w4a4", "RTN W4A4, T = 1"),
    ("omniquant-w4a4", "OmniQuant W4A4, T = 1"),
    ("omniquant-w5a5", "OmniQuant W5A5, T = 1"),
    ("spikellm-t2", "SpikeLLM, T = 2 for 10%"),
    ("p8", "the same, 8-bit probabilities"),
    ("spikellm-t4", "SpikeLLM, T = 4 for 5%"),
    ("rtn-t2", "RTN, T = 2 for 10%, signed"),
    ("rtn-t2-unsigned", "RTN, T = 2 for 10%, unsigned"),
    ("spikellm-w2a8", "SpikeLLM W2A8"),
    ("gptq-w2a16", "weights spike: GPTQ, 2 bits"),
    ("spikellm-gptq-w2a16", "weights spike: SpikeLLM, 2 bits, T = 2 for 10%"),
    ("gptq-w3a16", "weights spike: GPTQ, 3 bits"),
    ("spikellm-ternary", "weights spike: SpikeLLM, ternary, 1.4 steps"),
)
WEIGHT_NOTE = """The inputs are real (W…A16) but for W2A8: the weights are the spikes. GPTQ alone is one pass,
columns by falling activation, ranges of least error; *sweeps* are ours and lower the baseline as well, so each stands
beside its like. *Steps*: mean of a weight; of PB-LLM one for a binary weight, eight for one of 8 bits. *Stored*: bits a
weight in the file, scales, zero-points, biases and the tier of each channel included. PB-LLM-like weights are stored
real. *Additive*: share of MACs in whose place spikes only add; of PB-LLM, by its definition, the binary share. It is 1
wherever an operand is an integer train of spikes, 3-bit weights included, and so it tells SpikeLLM from PB-LLM, but not
from GPTQ."""
BITS_NOTE = """*Interpolated*: on the straight line of log perplexity over stored bits between GPTQ of 2 and of 3 bits;
there is no such network. Below 1 the steps buy more than bits for all weights would."""
ENERGY_NOTE = """Counts times published figures of single operations (45 nm); no chip was measured. Four figures in each
cell, all over a rival's energy, below 1 where spikes would be cheaper: operations **vs dense**, **vs quantised**; with
memory traffic **vs dense**, **vs quantised**. The quantised rival multiplies integers of the same bits by the same
weights, in one step ([energy.md](energy.md#bursts-and-integer-weights)). Prefill of two windows of 512 tokens."""
READING = """- **Spiking activations do not pay against integers.** Two to three additions for each multiplication are
  dearer than the multiplication by a 4-bit integer. No usable network is ESTIMATED below its quantised rival, under any
  cost model. Against the dense network most are in operations, but the quantised rival is so by more; with memory and
  int8 arithmetic none is.
- **Each bit doubles the spikes.** llama with OmniQuant: 2.2 additions a MAC at four bits, 4.2 at five, 29 at eight. So
  W5A5 has by far the better perplexity and a dearer spiking form; as integers, without spikes, it is the better network
  of the two.
- **Spiking weights pay, against both rivals as defined**: a weight of 2 or 3 bits is 0.7 or 1.3 additions a MAC, and a
  zero is silent. The rival multiplies real activations by integers of as many bits. That is no merit of salient steps:
  GPTQ's plain integers are such spikes too, and with 3 bits in one step perplexity is far lower than with 2 bits in 1.1
  or ternary weights in 1.4 steps, at a little more energy.
- **Signed spikes**, silent at zero, are a third of unsigned ones, and the values are the same bit for bit. (The
  unsigned row was measured on a CPU, the signed one on the H200: their perplexities differ by rounding alone.)
- Nearly half of the spikes are attention probabilities of 16 bits; with 8 perplexity hardly changes."""


def allocation_lines(rows: Rows, show: Show) -> list[str]:
    """The other options, one at a time."""
    found = []
    for variant, title in OTHERS:
        row = next((rows[m, variant] for m in MODELS if "ace" in rows.get((m, variant), {})), None)
        if row is not None:
            ace, spikes = row["ace"]["per_mac"]["spiking"], row["spikes_per_element"]
            found.append([title, f"{ace:.2f}", f"{spikes:.2f}", *(show(model, variant) for model in MODELS)])
    head = ["changed", "ACE a MAC", "spikes an element", *MODELS]
    return ["## Other options, one at a time", "", *table(head, found), FIRST, ""]


def mean_steps(options: dict[str, Any]) -> float:
    """Mean steps of a weight."""
    steps, shares = options.get("weight_steps", (1,)), options.get("weight_salient", ())
    return steps[0] * (1 - sum(shares)) + sum(t * share for t, share in zip(steps[1:], shares, strict=True))


def weight_lines(rows: Rows, show: Show) -> list[str]:
    """Networks whose weights have few bits."""
    found = []
    for variant, title in WEIGHTS:
        row = next((rows[m, variant] for m in MODELS if (m, variant) in rows), None)
        if row is None:
            continue
        binary = row["options"].get("weight_form") == "partial_binary"
        steps = mean_steps(row["options"])
        additive, ace, spikes, stored = f"{1 - sum(row['options'].get('weight_salient', ())):.2f}", "", "", "real"
        if not binary:
            additive, ace = f"{row['ace']['additive_fraction']:.2f}", f"{row['ace']['per_mac']['spiking']:.1f}"
            spikes, stored = f"{row['spikes_per_element']:.2f}", f"{16 * row['weights']['ratio']:.2f}"
        line = [title, f"{steps:.2f}", stored, ace, additive, spikes]
        found.append([*line, *(show(model, variant) for model in MODELS)])
    head = ["network", "steps", "stored", "ACE a MAC", "additive", "spikes an element", *MODELS]
    return ["## Weights of few bits", "", WEIGHT_NOTE, "", *table(head, found), *_bits_lines(rows)]


def _bits_lines(rows: Rows) -> list[str]:
    """SpikeLLM's weights beside what uniform GPTQ of 2 and 3 bits would make of their bits, one pass each."""
    found = []
    for model in MODELS:
        two, three = (rows.get((model, f"gptq-w{bits}a16")) for bits in (2, 3))
        for variant, title in (w for w in WEIGHTS if w[0] in ("spikellm-gptq-w2a16-plain", "spikellm-ternary-plain")):
            row = rows.get((model, variant))
            if two is None or three is None or row is None:
                continue
            low, high, at = (r["weights"]["ratio"] for r in (two, three, row))
            share = (at - low) / (high - low)
            line = math.exp((1 - share) * math.log(two["perplexity"]) + share * math.log(three["perplexity"]))
            own = row["perplexity"]
            found.append([model, title, f"{16 * at:.2f}", f"{own:.2f}", f"{line:.2f}", f"{own / line:.3f}"])
    head = ["model", "network", "stored", "perplexity", "uniform GPTQ, interpolated", "ratio"]
    return ["Held against GPTQ of as many stored bits, one pass each:", "", *table(head, found), BITS_NOTE, ""]


def energy_lines(rows: Rows) -> list[str]:
    """ESTIMATED energy."""
    found = []
    for model in MODELS:
        for variant, title in ENERGY:
            row = rows.get((model, variant))
            if row is None:
                continue
            cells = [", ".join(f"{row['estimated'][name][key]:.2f}" for key in RATIOS) for name in COST_MODELS]
            found.append([model, title, f"{row['perplexity']:.2f}", f"{row['accumulations_per_mac']:.2f}", *cells])
    head = ["model", "network", "perplexity", "additions a MAC", *COST_MODELS]
    lines = ["## ESTIMATED energy", "", ENERGY_NOTE, "", *table(head, found)]
    census = f"How many rows (of those that stay below {USABLE} times the dense perplexity) are ESTIMATED cheaper than"
    return [*lines, census, "", *_census(rows), READING, ""]


def _census(rows: Rows) -> list[str]:
    dense = {model: rows[model, "dense"]["perplexity"] for model in MODELS}
    counted = [row for row in rows.values() if "estimated" in row]
    counted = [row for row in counted if row["perplexity"] < USABLE * dense[row["model"].removesuffix("-twin")]]
    found = []
    for title, real in (("activations spike", False), ("weights spike", True)):
        chosen = [row for row in counted if (row["options"].get("bits") == 16) == real]
        for name in COST_MODELS if chosen else ():
            cells = []
            for key in RATIOS:
                values = [row["estimated"][name][key] for row in chosen]
                cells.append(f"{sum(v < 1 for v in values)} of {len(values)}, best {min(values):.2f}")
            found.append([title, name, *cells])
    return table(["", "cost model", "dense", "quantised", "dense, memory", "quantised, memory"], found)
