"""Raster plots: the literal spikes of one neuron population, step by step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikeform.errors import SpikeformError
from spikeform.layers.streaming import clock_of, steps_of
from spikeform.spikes import Burst, SpikeTrain, Thermometer
from spikeform.spikes.trace import Firing, Product, observe

MOST_ELEMENTS, MOST_TOKENS, MOST_COLUMNS = 512, 96, 1632
POSITIVE, NEGATIVE, GRID = "#1f5fa8", "#c8452c", "#d9d9d9"
LEGEND: dict[str, Any] = {
    "loc": "lower right",
    "bbox_to_anchor": (1, 1),
    "borderaxespad": 0.2,
    "handlelength": 1,
}


@dataclass(frozen=True)
class Raster:
    """A plot that was drawn, and what is on it.

    Attributes:
        path: The image.
        site: The population.
        spikes: Spikes drawn, ``positive`` + ``negative``; equal to ``train.count()`` over what is shown, of all
            steps where steps are rows of the batch. A burst's step holds several.
        positive: Spikes above zero.
        negative: Spikes below zero.
        tokens: Tokens shown.
        window: Steps of each token.
        elements: Channels shown.
        channels: Channels of the population.
    """

    path: str
    site: str
    spikes: int
    positive: int
    negative: int
    tokens: int
    window: int
    elements: int
    channels: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


class _Found(Exception):
    """The train is there; the rest of the forward is not needed."""


def raster(
    model: nn.Module,
    ids: Tensor,
    site: str | None = None,
    path: str | os.PathLike[str] = "raster.png",
    elements: int = 64,
    tokens: int = 24,
    labels: Sequence[str] | None = None,
) -> Raster:
    """Draw the literal spikes that one site sends or receives for the first row of ``ids``.

    Time runs to the right, token by token and step by step within a token; each line is a channel. The more spikes a
    burst sends in one step, the darker its mark. The steps of a streaming model are those of its T streams: it reads
    the whole row T times, and the plot gathers what each token sends in them.

    Args:
        model: A converted model.
        ids: Token ids ``[N, L]``; only the first row, cut to ``tokens``, is run.
        site: A site as the energy report names it; None takes the first linear layer that receives spikes, or the
            first neuron where none does. Of a product of several trains the first is drawn; of the projection behind
            spiking self-attention, whose input is a count, the spikes that were counted.
        path: Image to write (PNG; any suffix that matplotlib knows). Its folder must exist.
        elements: Most channels to draw, the first ones.
        tokens: Most tokens to draw.
        labels: Text of each token, for the axis; None numbers them.

    Returns:
        Path and counts.

    Raises:
        SpikeformError: No such site (the message names some), no spikes at all, a bad size, no such folder, or a
            streaming model at ``steps=0``, where it sends no spikes.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise SpikeformError("ids must be a non-empty integer tensor [N, L] of token ids")
    for label, value, most in (("elements", elements, MOST_ELEMENTS), ("tokens", tokens, MOST_TOKENS)):
        if not 1 <= value <= most:
            raise SpikeformError(f"{label} must be from 1 to {most}, got {value}: a spike needs its own pixel")
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise SpikeformError(f"no folder {path.absolute().parent} to write the raster plot to")
    steps = steps_of(model)
    if clock_of(model) is not None and not steps:
        raise SpikeformError("at steps=0 the model is the QCFS network and sends no spikes: set_steps(model, 8) first")
    if steps * min(tokens, ids.shape[1]) > MOST_COLUMNS:
        raise SpikeformError(f"{steps} steps a token leave room for {MOST_COLUMNS // steps} tokens: give tokens=")
    name, train = capture(model, ids[:1, :tokens], site)
    spikes_TLC = literal(train, steps)[:, :tokens]
    shown = spikes_TLC[..., :elements]
    most = train.coding.levels if isinstance(train.coding, Burst) else 1
    shown = shown.int() if most > 1 else shown.sign().int()  # elsewhere an amplitude is one spike's level
    _draw(shown, name, path, spikes_TLC.shape[-1], labels, most)
    positive, negative = int(shown.clamp(min=0).sum()), int(-shown.clamp(max=0).sum())
    window, length, drawn = shown.shape
    return Raster(str(path), name, positive + negative, positive, negative, length, window, drawn, spikes_TLC.shape[-1])


@torch.no_grad()
def capture(model: nn.Module, ids: Tensor, site: str | None = None) -> tuple[str, SpikeTrain]:
    """The first train that passes ``site`` and the site's name.

    None: that of the first linear product, or of the first neuron where spikes reach no linear layer. Spikes of weights
    are no activity: they are the same for every token. What reaches the projection behind spiking self-attention is the
    sum of its LIF neurons' T steps; their train is given, in which every spike has its step.

    Raises:
        SpikeformError: Nothing passes there.
    """
    seen: dict[str, None] = {}
    constant: set[str] = set()
    found: list[tuple[str, SpikeTrain]] = []
    fired: list[tuple[str, SpikeTrain]] = []
    summed: dict[str, SpikeTrain] = {}  # by attention module: what its output neurons sent

    def train_of(event: Product | Firing) -> SpikeTrain:
        train = event.operands[0] if isinstance(event, Product) else event.train
        return train if _by_step(train) else summed.get(event.site.rpartition(".")[0], train)

    def listen(event: Product | Firing) -> None:
        if isinstance(event, Product) and event.kind == "weights":
            constant.add(event.site)
            return
        seen[event.site] = None
        if isinstance(event, Firing) and _by_step(event.train) and event.site.endswith(".output"):
            summed[event.site.rpartition(".")[0]] = event.train
        is_linear = isinstance(event, Product) and event.kind == "linear"
        if event.site == site if site is not None else is_linear:
            found.append((event.site, train_of(event)))
            raise _Found
        if site is None and not fired and isinstance(event, Firing):
            fired.append((event.site, event.train))

    device = next((p.device for p in model.parameters()), ids.device)
    training = model.training
    model.eval()
    try:
        with observe(listen):
            model(ids.to(device))
    except _Found:
        return found[0]
    finally:
        model.train(training)
    if site in constant or (constant and not seen):
        raise SpikeformError("the spikes there are those of the weights, the same for every token: nothing to draw")
    if not seen:
        raise SpikeformError("no spikes: the model is dense; convert it first")
    if fired:
        return fired[0]
    some = ", ".join(list(seen)[:8]) + (" …" if len(seen) > 8 else "")
    raise SpikeformError(f"no site {site!r}; spikes pass {len(seen)} sites: {some}")


def literal(train: SpikeTrain, steps: int = 0) -> Tensor:
    """Literal spikes of the first row: integers ``[window, tokens, channels]``; heads stand side by side.

    Trains are ``[B, L, C]``, ``[B, heads, L, C]``, ``[L, C]`` or ``[C]`` (one token); those of a streaming model
    of T ``steps`` are ``[B*T, L, C]`` of one step each, row b*T+t is step t of row b, or ``[T*L, C]`` of one row;
    those of LIF neurons ``[T, B, heads, L, C]``.
    """
    spikes = train.unroll().cpu()
    if _by_step(train):
        return spikes[0, :, 0].movedim(-2, 1).flatten(2)
    if steps and train.coding == Thermometer(1):
        return spikes[0].unflatten(0, (steps, -1)) if train.codes.ndim == 2 else spikes[0, :steps]
    if train.codes.ndim >= 3:
        spikes = spikes[:, 0]
    if spikes.ndim > 3:
        return spikes.movedim(-2, 1).flatten(2)
    return spikes if spikes.ndim == 3 else spikes.unsqueeze(1)


def _by_step(train: SpikeTrain) -> bool:
    """Whether the first axis is time: what LIF neurons send."""
    return train.coding == Thermometer(1) and train.codes.ndim == 5


def _draw(
    spikes_TLC: Tensor, site: str, path: Path, channels: int, labels: Sequence[str] | None, most: int = 1
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap
    from matplotlib.figure import Figure

    window, length, drawn = spikes_TLC.shape
    time_CX = spikes_TLC.permute(2, 1, 0).reshape(drawn, length * window)
    columns = length * window
    figure = Figure(figsize=(min(max(columns * 0.045, 7), 20), min(max(drawn * 0.07 + 1.9, 3.2), 12)), dpi=130)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 1, height_ratios=[max(drawn * 0.07, 1.5), 0.6], hspace=0.06)
    spikes, rate = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    colours = ListedColormap([NEGATIVE, "white", POSITIVE])
    if most > 1:  # a root, so that one spike can be seen beside a full step
        colours = LinearSegmentedColormap.from_list("bursts", [NEGATIVE, "white", POSITIVE])
        marks = time_CX.sign() * (time_CX.abs() / most).sqrt()
    else:
        marks = time_CX
    spikes.imshow(marks, cmap=colours, vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    for edge in range(1, drawn):  # channels a hair apart
        spikes.axhline(edge - 0.5, color="white", linewidth=min(0.6, 40 / drawn))
    for edge in range(window, columns, window):
        for axes in (spikes, rate):
            axes.axvline(edge - 0.5, color=GRID, linewidth=0.6)
    positive, negative = time_CX.clamp(min=0).sum(0), -time_CX.clamp(max=0).sum(0)
    x = range(columns)
    rate.bar(x, positive, width=1.0, color=POSITIVE, label=f"+ {int(positive.sum()):,}")
    rate.bar(x, negative, width=1.0, bottom=positive, color=NEGATIVE, label=f"− {int(negative.sum()):,}")
    for axes in (spikes, rate):
        axes.set_xlim(-0.5, columns - 0.5)
        axes.spines[["top", "right"]].set_visible(False)
    spikes.set_xticks([])
    every = max(1, -(-length // 24))
    middles = range(0, length, every)
    texts = [str(i) if labels is None or i >= len(labels) else _visible(labels[i]) for i in middles]
    turned: dict[str, Any] = {"rotation": 45, "ha": "right"} if labels is not None else {}
    rate.set_xticks([i * window + (window - 1) / 2 for i in middles], texts, fontsize=7, **turned)
    rate.tick_params(axis="y", labelsize=7)
    spikes.tick_params(axis="y", labelsize=7)
    spikes.set_ylabel(f"channel (first {drawn} of {channels})" if drawn < channels else "channel", fontsize=8)
    rate.set_ylabel("spikes", fontsize=8)
    rate.set_xlabel(f"token, {window} steps each", fontsize=8)
    total = int(positive.sum() + negative.sum())
    title = f"{site}\n{total:,} spikes, {total / max(drawn * length, 1):.2f} a channel and token"
    spikes.set_title(title, fontsize=9, loc="left")
    spikes.legend(*rate.get_legend_handles_labels(), fontsize=8, ncols=2, frameon=False, **LEGEND)
    figure.savefig(path, bbox_inches="tight")


def _visible(text: str) -> str:
    return text.replace("\n", "⏎").replace("$", r"\$").strip() or "␣"
