"""``spikeform.energy``: run, count, price, and say what was not counted."""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter as Histogram
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spikeform.conversion.kinds import mixers
from spikeform.energy import attention, state_space, streaming
from spikeform.energy.ace import effort
from spikeform.energy.count import Counter
from spikeform.energy.estimate import operations, price
from spikeform.energy.models import FP32, resolve
from spikeform.energy.rows import kinds, sites
from spikeform.errors import SpikeformError
from spikeform.layers.self_attention import SpikingSelfAttention
from spikeform.layers.streaming import neurons_of, paused, steps_of
from spikeform.neurons import GIF
from spikeform.synapses import explain

NOT_COUNTED = [
    "softmax: the row maximum (winner-take-all), its subtraction and the row sum",
    "norms: means and the centring; gains and offsets are counted",
    "residual additions, score scaling, rotary embedding, embedding look-up (in none of the three networks)",
    "exp, division, squares, square roots and activation functions of the dense and the quantised network "
    "(the spiking one pays for its HG neurons, which favours its rivals)",
    "the exponent or sub-neuron choice in the quantised rival (the mantissa's width alone, which favours it)",
    "accumulators and registers; the shift of a binary step weight (wiring)",
    "routing of spikes over a network on chip, clock, control, leakage, idle power",
]
ROW_BY_ROW = (
    "finding a row's range (its least and largest value), rotating heads, and the values' units that go into the "
    "probabilities: in the quantised rival alike, not in the dense network, which favours both over it"
)


@dataclass(frozen=True)
class EnergyReport:
    """What one measurement found. Counts are exact; energies are ESTIMATED, in pJ, from published figures.

    Attributes:
        per_site: One row per product, neuron population and module left real.
        per_kind: Elements, spikes, accumulations and MACs by kind of operation.
        tokens: Tokens run.
        spikes: Spikes that all neurons sent; where no neuron fires but weights are spikes, those of the weights, for
            each row of their input.
        spikes_per_element: Spikes of one neuron in one window (a streaming neuron's are its T steps), mean over all
            neurons that fired.
        spikes_per_token: Spikes of the whole network for one token.
        spike_rate: Spikes per element per step.
        accumulations_per_mac: Additions of products over the MACs they replace: spikes per element weighted
            by fan-out, the figure to hold against a break-even.
        ops: Operations of the spiking, dense and quantised network.
        estimates: By cost model: energies, ratios, lines, memory traffic.
        break_even: What the figures above must stay below.
        not_counted: What is in no figure.
        protocol: Model, data and settings that reproduce the numbers.
        accountings: Of a streaming network: what runs, and the papers' convention, by cost model. Of a state-space
            model: products alone, in three widths (:mod:`spikeform.energy.state_space`).
        streaming: Of a streaming network: operations, attention, weights and cache beside one dense pass.
        attention: Of spiking self-attention: rates and additions by layer, both forms beside dense attention, and the
            formula of papers (:func:`spikeform.energy.attention.facts`).
        ace: Of other networks: arithmetic computation effort of the converted linear layers, beside uniform 4 and 5
            bits and dense fp16, and the additive fraction (:func:`spikeform.energy.ace.effort`).
    """

    per_site: list[dict[str, Any]]
    per_kind: dict[str, dict[str, int]]
    tokens: int
    spikes: int
    spikes_per_element: float
    spikes_per_token: float
    spike_rate: float
    accumulations_per_mac: float
    ops: dict[str, dict[str, int]]
    estimates: dict[str, dict[str, Any]]
    break_even: dict[str, Any]
    not_counted: list[str]
    protocol: dict[str, Any]
    accountings: dict[str, dict[str, Any]] = field(default_factory=dict)
    streaming: dict[str, Any] = field(default_factory=dict)
    ace: dict[str, Any] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return {"label": "ESTIMATED", **asdict(self)}

    def summary(self) -> list[dict[str, Any]]:
        """Rows of ESTIMATED uJ per token of the networks, and the ratios, two a cost model.

        A streaming network has another rival, and a row more a cost model in the papers' convention.
        """
        rows = []
        for name, estimate in self.estimates.items():
            for title, part in (("operations", estimate), ("with memory", estimate["with_memory"])):
                rows.append({"ESTIMATED": f"{name}, {title}", **self._row(part)})
        for name, part in self.accountings.get(streaming.PAPERS, {}).get("estimates", {}).items():
            title = f"{name}, {streaming.PAPERS} (not what runs)"
            rows.append({"ESTIMATED": title, "accounting": streaming.PAPERS, **self._row(part)})
        return rows

    def _row(self, part: dict[str, Any]) -> dict[str, float]:
        found = {key: title for key, title in _NETWORKS.items() if key in part}
        per_token = {f"{title} uJ/token": part[key] / self.tokens * 1e-6 for key, title in found.items()}
        rivals = {key: title for key, title in found.items() if key != "spiking"}
        return per_token | {f"vs {title}": part[f"ratio_vs_{key}"] for key, title in rivals.items()}


_NETWORKS = {"spiking": "spiking", "dense": "dense", "quantised": "quantised", "quantised_steps": "quantised to T"}


def energy(
    spiking: nn.Module,
    ids: Tensor,
    *,
    dense: nn.Module | None = None,
    batch_size: int = 1,
    window: int | None = None,
    cost_models: dict | list | tuple | None = None,
) -> EnergyReport:
    """Count what a spiking model does on ``ids`` and estimate the energy of three networks.

    Each window is a full forward (prefill, no cache). Spikes are counted from the trains, whatever executor
    runs. A streaming model runs twice: with its T steps, and as the QCFS network (``steps=0``), whose one pass is
    the dense network of the report.

    Args:
        spiking: A converted model; it is run as it is, in evaluation mode.
        ids: Token ids, integers ``[N, L]``, without padding.
        dense: The model it came from, or None. If given, its linear layers must do the same MACs.
        batch_size: Rows in one forward call. Counts do not depend on it; weight traffic does.
        window: Cut each row into windows of this many tokens; None runs whole rows.
        cost_models: Names or :class:`CostModel` s; None for the three built in.

    Returns:
        The report. Energies are estimates, never measurements.

    Raises:
        SpikeformError: Ids of a wrong shape or type, bad sizes, a model that sent no spikes, or a ``dense``
            model of other linear layers.
    """
    models = resolve(cost_models)
    _check(spiking, ids, batch_size, window)
    steps = steps_of(spiking)
    if not steps and neurons_of(spiking):
        raise SpikeformError(
            "at steps=0 the model is the QCFS network, which sends no spikes: set_steps(model, 8) first"
        )
    scans, attends = bool(mixers(spiking)), _attends(spiking)
    counter = _counted(spiking, ids, batch_size, window, steps, real=bool(steps) or scans or attends)
    if not counter.products and not (steps and counter.firings):
        raise SpikeformError("no spike train reached a synapse: the model is dense; convert it first")
    baseline = None
    if steps:
        with paused(spiking):
            baseline = _counted(spiking, ids, batch_size, window, real=True)
    if dense is not None:
        _compare(baseline or counter, dense, ids, batch_size, window)
    spikes, elements, slots = _sent(counter)
    macs = sum(tally.macs for tally in (baseline or counter).products.values())
    accumulations = sum(t.accumulations + t.level_additions for t in counter.products.values())
    estimates = {model.name: price(counter, model, baseline) for model in models}
    return EnergyReport(
        per_site=sites(counter),
        per_kind=kinds(counter),
        tokens=ids.numel(),
        spikes=spikes,
        spikes_per_element=spikes / max(elements, 1),
        spikes_per_token=spikes / ids.numel(),
        spike_rate=spikes / max(slots, 1),
        accumulations_per_mac=accumulations / max(macs, 1),
        ops=operations(counter, baseline),
        estimates=estimates,
        break_even={
            "accumulations_per_mac": {model.name: model.break_even for model in models},
            "spikes_per_element_fp32": FP32.break_even,
            "spike_rate": [0.057, 0.064],
            "source": "MAC over AC of each cost model; arXiv 2409.08290: a rate-coded network beats its "
            "quantised twin below 6.4% (v2, v3; T of 5 to 10) or 5.7% (v4; T = 5) of its spike slots, data "
            "movement counted",
        },
        not_counted=_not_counted(spiking, steps) + _left_out(spiking, counter),
        protocol=_protocol(spiking, dense, ids, batch_size, window),
        accountings=(
            streaming.accountings(counter, baseline, estimates, models)
            if baseline
            else state_space.accountings(counter, spiking, models)
            if scans
            else {}
        ),
        streaming=streaming.facts(spiking, ids[:, :window], counter, baseline) if baseline else {},
        ace={} if baseline else effort(counter, ids.numel()),
        attention=attention.facts(counter, models),
    )


def _attends(model: nn.Module) -> bool:
    return any(isinstance(module, SpikingSelfAttention) for module in model.modules())


def _check(model: nn.Module, ids: Tensor, batch_size: int, window: int | None) -> None:
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise SpikeformError("ids must be a non-empty integer tensor [N, L] of token ids")
    for name, value in (("batch_size", batch_size), ("window", window)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise SpikeformError(f"{name} must be a positive integer, got {value!r}")
    length = min(ids.shape[1], window or ids.shape[1])
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(context, int) and length > context:
        raise SpikeformError(f"rows of {length} tokens exceed the model's context of {context}; give window={context}")


def _counted(
    model: nn.Module, ids: Tensor, batch_size: int, window: int | None, steps: int = 0, real: bool = False
) -> Counter:
    counter = Counter(steps, real)
    with counter.watch(model):
        _run(model, ids, batch_size, window)
    return counter


@torch.no_grad()
def _run(model: nn.Module, ids: Tensor, batch_size: int, window: int | None) -> None:
    device = next((p.device for p in model.parameters()), ids.device)
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    training = model.training
    model.eval()
    try:
        for rows in ids.split(batch_size):
            for piece in rows.split(window or ids.shape[1], dim=1):
                model(piece.to(device), **options)
    finally:
        model.train(training)


def _compare(counter: Counter, dense: nn.Module, ids: Tensor, batch_size: int, window: int | None) -> None:
    """The dense model's own linear layers must do the MACs that the report gives the dense network."""
    own = _counted(dense, ids, batch_size, window)
    if own.products:
        raise SpikeformError("the dense model sends spikes: give the model as it was before conversion")
    left = sum(tally.macs for tally in counter.dense.values())
    ours = left + sum(t.macs for t in counter.products.values() if t.converted)
    theirs = sum(tally.macs for tally in own.dense.values())
    if ours != theirs:
        raise SpikeformError(
            f"linear layers of the dense model do {theirs} MACs, of the spiking one {ours}: not a pair"
        )


def _sent(counter: Counter) -> tuple[int, int, int]:
    """Spikes, elements and slots of all neurons.

    Where no neuron announced a train (hand-made ones, or from a cache; spiking weights) those of the operands; a
    weight's spikes are sent for each row of its input.
    """
    sums = [(t.sent.spikes, t.sent.elements, t.sent.slots) for t in counter.firings.values()]
    for tally in () if sums else counter.products.values():
        if tally.kind == "weights":
            slots = tally.operands[0].slots * tally.macs // tally.operands[0].elements
            sums.append((tally.accumulations, tally.macs, slots))
        else:
            sums += [(p.spikes, p.elements, p.slots) for p in tally.operands]
    spikes, elements, slots = (sum(values) for values in zip(*sums, strict=True))
    return spikes, elements, slots


def _not_counted(model: nn.Module, steps: int) -> list[str]:
    if steps:
        return streaming.NOT_COUNTED
    if mixers(model):
        return state_space.NOT_COUNTED
    if _attends(model):
        return attention.NOT_COUNTED
    return [*NOT_COUNTED, ROW_BY_ROW] if any(isinstance(m, GIF) for m in model.modules()) else NOT_COUNTED


def _left_out(model: nn.Module, counter: Counter) -> list[str]:
    """Modules that the conversion left dense and whose work no hook can count; a mixer's parts are told elsewhere."""
    rows = getattr(getattr(model, "spikeform_report", None), "rows", [])
    counted = {name for name, tally in counter.dense.items() if tally.macs}
    counted |= {name for name, tally in counter.real.items() if tally.macs or tally.multiplications}
    told = ("embedding", "state_space")
    left = Histogram(
        row.kind for row in rows if row.replaced_by is None and row.kind not in told and row.name not in counted
    )
    return [f"left dense and not counted: {number} x {kind}" for kind, number in sorted(left.items())]


def _protocol(
    model: nn.Module, dense: nn.Module | None, ids: Tensor, batch_size: int, window: int | None
) -> dict[str, Any]:
    config = getattr(model, "config", None)
    method = getattr(config, "quantization_config", None)
    parameters = {str(p.dtype).removeprefix("torch.") for p in (model if dense is None else dense).parameters()}
    return {
        "model": getattr(config, "name_or_path", "") or type(model).__name__,
        "method": method.to_dict() if hasattr(method, "to_dict") else method,
        "ids_shape": list(ids.shape),
        "ids_sha256": hashlib.sha256(ids.cpu().to(torch.int64).contiguous().numpy().tobytes()).hexdigest(),
        "batch_size": batch_size,
        "window": window or ids.shape[1],
        "forward": "full windows, no cache",
        "executor": _executor(),
        "dense_precision": sorted(parameters),
        "dense_checked": dense is not None,
        "torch": str(torch.__version__),
    }


def _executor() -> str:
    name, reason = explain("linear")
    return name if reason.startswith("chosen") else "automatic"
