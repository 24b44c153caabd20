"""Measurements as tables and sentences for people. The numbers themselves are in the JSON documents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spikeform.cli.output import Output

if TYPE_CHECKING:
    from spikeform.energy import EnergyReport
    from spikeform.evaluation import Fidelity

_ENERGY_COLUMNS = ("ESTIMATED, µJ a token", "spiking", "dense", "quantised", "vs dense", "vs quantised")


def show_fidelity(output: Output, found: Fidelity) -> None:
    """How close the spiking model is to the dense one."""
    stderr = "" if found.ratio_stderr != found.ratio_stderr else f" ± {found.ratio_stderr:.6f}"
    block, cosine = min(found.cosine.items(), key=lambda item: item[1])
    output.table(
        [
            {"fidelity": "perplexity, dense", "value": f"{found.dense_perplexity:.4f}"},
            {"fidelity": "perplexity, spiking", "value": f"{found.perplexity:.4f}"},
            {"fidelity": "ratio (1 is lossless)", "value": f"{found.perplexity_ratio:.6f}{stderr}"},
            {"fidelity": "KL(dense || spiking)", "value": f"{found.kl:.2e} nats a token"},
            {"fidelity": "same likeliest token", "value": f"{found.top1_agreement:.2%}"},
            {"fidelity": "lowest cosine of a block", "value": f"{cosine:.6f} ({block})"},
            {"fidelity": "tokens scored", "value": f"{found.tokens:,}"},
        ]
    )
    output.say(f"protocol {found.protocol}", "dim")


def show_energy(output: Output, report: EnergyReport) -> None:
    """Spikes, the three networks' estimated energies, and which of them is the cheapest."""
    dense_break_even = report.break_even["accumulations_per_mac"]
    output.table(
        [
            {"spikes": "per element (a value in one window)", "value": f"{report.spikes_per_element:.2f}"},
            {"spikes": "per token, whole network", "value": f"{report.spikes_per_token:,.0f}"},
            {"spikes": "share of time slots with a spike", "value": f"{report.spike_rate:.1%}"},
            {"spikes": "additions per multiply-accumulate", "value": f"{report.accumulations_per_mac:.2f}"},
        ]
    )
    pairs = ", ".join(f"{value:.2f} ({name})" for name, value in dense_break_even.items())
    output.say(f"Additions alone break even with the dense network below {pairs} a multiply-accumulate.", "dim")
    output.say()
    output.table([_energy_row(row) for row in report.summary()], _ENERGY_COLUMNS)
    output.say(
        "ESTIMATED: exact counts times published energies of single operations (45 nm). Nothing was measured "
        "on a chip. 'quantised' is the fair rival: as many activation levels, and no time steps.",
        "dim",
    )
    output.say(verdict(report), "bold")


def _energy_row(row: dict[str, Any]) -> dict[str, Any]:
    cells = {_ENERGY_COLUMNS[0]: row["ESTIMATED"]}
    cells |= {name: round(row[f"{name} uJ/token"], 2) for name in ("spiking", "dense", "quantised")}
    return cells | {name: f"{row[name]:.2f} x" for name in ("vs dense", "vs quantised")}


def verdict(report: EnergyReport) -> str:
    """One honest line for each rival: under how many of the estimates does the spiking network cost less?"""
    lines = []
    for rival in ("dense", "quantised"):
        ratios = [row[f"vs {rival}"] for row in report.summary()]
        wins = sum(ratio < 1 for ratio in ratios)
        how = {0: "loses to", len(ratios): "beats"}.get(wins, f"beats, in {wins} of {len(ratios)} estimates,")
        span = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"The spiking network {how} the {rival} one: {span} times its energy (ESTIMATED).")
    return "\n".join(lines)
