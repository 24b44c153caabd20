"""Which neuron sits where."""

from __future__ import annotations

from fnmatch import fnmatch

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spikeform.conversion import ConversionReport, Row
from spikeform.conversion.builder import walked
from spikeform.conversion.kinds import blocks, feed_forward_pairs
from spikeform.errors import ConversionError
from spikeform.layers import SpikingActivation, SpikingLinear
from spikeform.layers.streaming import install
from spikeform.methods.fas import operators
from spikeform.methods.fas.config import FAS
from spikeform.neurons import Clock, StreamingNeuron

_REAL = {
    "embedding": "a look-up: no product to spike through",
    "unknown": "unknown module type",
    "state_space": "the core of a state-space mixer: convolution, scan and gate",
    "norm": "real, on each step by itself (see operators)",
    "attention": "real, on each step by itself (see operators)",
    "gated_mlp": "its neuron sits inside",
}


def prepare(model: PreTrainedModel, config: FAS) -> ConversionReport:
    """Put streaming neurons in, and give the model its time. Thresholds are not set yet."""
    everything = walked(model, config.skip)
    found = blocks(model)
    _refuse(model, len(found))
    builder = _Builder(model, config, tuple(f"{name}." for name, _ in found))
    for name, module, kind in everything:
        builder.visit(name, module, kind)
    builder.mark()
    if config.operators is not None:
        operators.put_in(model, config, builder.report)
    if builder.neurons:
        shared = [] if config.sites == "all" else _before_the_spikes(model, found[0][0], everything)
        beside = tuple(
            m for name, m, _ in everything if name.startswith(f"{found[0][0]}.") and name.endswith(".up_proj")
        )
        install(model, builder.clock, [block for _, block in found], shared, beside)
    return builder.report


def _refuse(model: PreTrainedModel, blocks: int) -> None:
    """What cannot be given time: the T streams run through one stack of blocks, each of them once."""
    config, name = model.config.get_text_config(), type(model).__name__
    runs = getattr(config, "num_hidden_layers", None) or blocks
    if getattr(model.config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ConversionError(f"{name} attends to an encoder; FAS streams one stack of blocks only")
    if not blocks or runs != blocks:
        raise ConversionError(f"{name} runs {runs} blocks and has {blocks}: FAS needs a stack of blocks, each run once")


def _before_the_spikes(
    model: PreTrainedModel, first: str, everything: list[tuple[str, nn.Module, str]]
) -> list[nn.Module]:
    """What in the first block may run before its first spike: attention as a whole, norms, linear layers."""
    inside = [(name, kind) for name, _, kind in everything if name.startswith(f"{first}.")]
    attention = tuple(f"{name}." for name, kind in inside if kind == "attention")
    if not attention:  # of an unknown type: masks and caches are as many as its rows
        return []
    names = [name for name, kind in inside if kind in ("attention", "norm", "linear")]
    # Looked up again, as the conversion replaced some. One that receives spikes has time itself.
    found = [model.get_submodule(name) for name in names if not name.startswith(attention)]
    return [module for module in found if not isinstance(module, SpikingLinear)]


class _Builder:
    """Builds each spiking layer, and writes the report as it goes."""

    def __init__(self, model: PreTrainedModel, config: FAS, inside: tuple[str, ...]) -> None:
        self.model, self.config, self.inside = model, config, inside
        self.begun = False  # whether the walk has come to the blocks, where time begins
        self.clock = Clock(config.steps)
        self.report = ConversionReport("fas")
        self.neurons: list[str] = []
        pairs = [p for p in feed_forward_pairs(model) if not self._skipped(p.act) and not self._skipped(p.linear)]
        self.by_act = {pair.act: pair for pair in pairs}
        self.by_linear = {pair.linear: pair for pair in pairs}

    def _skipped(self, name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in self.config.skip)

    def visit(self, name: str, module: nn.Module, kind: str) -> None:
        if kind in _REAL:
            detail = f" {type(module).__qualname__}" if kind == "unknown" else ""
            self.report.rows.append(Row(name, kind, None, _REAL[kind] + detail))
            return
        self.begun = self.begun or name.startswith(self.inside)
        layer, reason = (None, "named in skip") if self._skipped(name) else getattr(self, f"_{kind}")(name, module)
        if layer is not None:
            skeleton = any(p.device.type == "meta" for p in self.model.parameters())
            if not skeleton:
                layer.to(next((p.device for p in module.parameters()), self.model.device))
            self.model.set_submodule(name, layer)
        self.report.rows.append(Row(name, kind, None if layer is None else type(layer).__name__, reason))

    def _neuron(self, site: str, channels: int, signed: bool) -> StreamingNeuron:
        config = self.config
        self.neurons.append(site)
        neuron = StreamingNeuron(
            self.clock,
            config.levels,
            signed=signed,
            channels=channels,
            per_channel=config.per_channel,
            positional=site.startswith(self.inside),
            surrogate=config.surrogate,
            site=site,
        )
        neuron.refine(config.granularity, config.positions)
        return neuron

    def _linear(self, name: str, module: nn.Linear | Conv1D) -> tuple[nn.Module | None, str]:
        features = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
        pair = self.by_linear.get(name)
        everywhere = self.config.sites == "all" and name.startswith(self.inside)
        if pair is not None and not pair.gated:
            return SpikingLinear.from_dense(module, self._neuron(name, features, False)), f"IF, in place of {pair.act}"
        if pair is not None and (self.config.gated == "product" or everywhere):
            return SpikingLinear.from_dense(
                module, self._neuron(name, features, True)
            ), "signed IF of the gated product"
        if pair is not None:
            return SpikingLinear.from_dense(module, None), "real values, gated by the spikes of the activation"
        if everywhere:
            return SpikingLinear.from_dense(module, self._neuron(name, features, True)), "signed IF"
        return None, "real input on each step (see sites)"

    def _activation(self, name: str, module: nn.Module) -> tuple[nn.Module | None, str]:
        pair = self.by_act.get(name)
        if pair is not None and not pair.gated:
            return nn.Identity(), f"its IF sits in {pair.linear}"
        if pair is not None and self.config.gated == "product":
            return None, f"real; the gated product is encoded in {pair.linear}"
        feeding = self._feeding(name)
        if feeding is None:
            return None, "no linear layer before it in its module: what it receives may be no streams"
        if not self.begun:
            return None, "before the first block, where time begins"
        linear = feeding[1]
        width = linear.weight.shape[1] if isinstance(linear, Conv1D) else linear.out_features
        return SpikingActivation(self._neuron(name, width, False)), "IF"

    def _feeding(self, name: str) -> tuple[str, nn.Linear | Conv1D] | None:
        """The linear layer that stands before an activation in its parent."""
        parent = name.rpartition(".")[0]
        inside = self.model.get_submodule(parent).named_modules(prefix=parent)
        return next(((n, m) for n, m in inside if isinstance(m, nn.Linear | Conv1D)), None)

    def mark(self) -> None:
        """Make sure the files cannot be loaded as the dense model: some weight must have the spiking form."""
        if not self.neurons or any(isinstance(m, SpikingLinear) for m in self.model.modules()):
            return
        found = [self._feeding(site) for site in self.neurons]
        free = {name: linear for name, linear in filter(None, found) if not self._skipped(name)}
        if not free:
            raise ConversionError(
                "every linear layer beside a neuron is named in skip: nothing in the saved files would tell a program "
                "without spikeform that this is no dense model; leave one of them out of skip"
            )
        for name, linear in free.items():
            self.model.set_submodule(name, SpikingLinear.from_dense(linear, None))
            row = Row(name, "linear", "SpikingLinear", "real values; marks the files as spiking")
            self.report.rows = [row if r.name == name else r for r in self.report.rows]
