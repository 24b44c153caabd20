"""Measurements as tables and sentences for people. The numbers themselves are in the JSON documents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spikeform.cli.output import Output

if TYPE_CHECKING:
    from spikeform.energy import EnergyReport
    from spikeform.evaluation import Fidelity

_TITLE = "ESTIMATED, µJ a token"
_RIVALS = {
    "dense": "the dense one",
    "quantised": "the quantised one",
    "quantised to T": "the one quantised to as many levels as its steps",
}
_NETWORKS = ("spiking", *_RIVALS)


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


def size_line(size: dict[str, Any]) -> str:
    """What the weights of the converted linear layers take, of :func:`spikeform.report.weights.coded_size`."""
    return (
        f"{size['layers']} converted linear layers take {size['bytes']:,} bytes, {size['ratio']:.3f} of the "
        f"{size['bf16_bytes']:,} that they take in bf16"
    )


def show_energy(output: Output, report: EnergyReport) -> None:
    """Spikes, the three networks' estimated energies, and which of them is the cheapest."""
    dense_break_even = report.break_even["accumulations_per_mac"]
    where = " that spikes replace" if report.streaming else ""
    output.table(
        [
            {"spikes": "per element (a value in one window)", "value": f"{report.spikes_per_element:.2f}"},
            {"spikes": "per token, whole network", "value": f"{report.spikes_per_token:,.0f}"},
            {"spikes": "share of time slots with a spike", "value": f"{report.spike_rate:.1%}"},
            {"spikes": f"additions per multiply-accumulate{where}", "value": f"{report.accumulations_per_mac:.2f}"},
        ]
    )
    pairs = ", ".join(f"{value:.2f} ({name})" for name, value in dense_break_even.items())
    output.say(f"Additions alone break even with the dense network below {pairs} a multiply-accumulate.", "dim")
    output.say()
    output.table([_energy_row(row) for row in report.summary()])
    output.say(
        "ESTIMATED: exact counts times published energies of single operations (45 nm). Nothing was measured "
        "on a chip. 'quantised' is the fair rival: as many activation levels, and no time steps.",
        "dim",
    )
    if report.streaming:
        _show_streaming(output, report)
    elif report.accountings:
        _show_accountings(output, report.accountings)
    if report.attention:
        _show_attention(output, report.attention)
    # The measure of networks of bursts and integer weights; for others it is in the document alone.
    if report.ace and any("weight_bits" in row or "Burst" in row.get("coding", ()) for row in report.per_site):
        _show_effort(output, report.ace)
    output.say(verdict(report), "bold")


def _show_streaming(output: Output, report: EnergyReport) -> None:
    """What T passes are beside one, and what the papers' convention is."""
    found, rate = report.streaming, report.accountings["papers' convention"]["rate"]
    steps, operations, decoding = found["steps"], found["operations"], found["decoding"]
    output.say(
        f"'quantised to T' has as many levels as {steps} steps. The papers' convention takes every multiplication of "
        f"the network for additions at the mean firing rate ({rate:.1%}); what runs multiplies wherever no spikes "
        "arrive, in every step.",
        "dim",
    )
    output.say()
    label = f"{steps} steps beside one dense pass"
    share = operations["spiking_share"]
    output.say(f"Spikes arrive where the dense network does {share:.1%} of the linear layers' multiplications.", "dim")
    rows = [
        {label: "rows that linear layers multiply", "times": operations["rows_ratio"]},
        {label: "the same, spikes counted as additions", "times": operations["events_ratio"]},
        {label: "attention", "times": found["attention"]["macs"] / max(found["attention"]["dense_macs"], 1)},
    ]
    if decoding:
        rows.append({label: "bytes of weights read for a token", "times": decoding["weight_ratio"]})
        rows.append({label: "bytes of the cache of keys and values", "times": decoding["cache_ratio"]})
    output.table([{**row, "times": f"{row['times']:.2f} x"} for row in rows])


def _show_accountings(output: Output, found: dict[str, Any]) -> None:
    """What the products alone of a state-space model cost, by what is taken in."""
    output.say()
    rows = [
        {
            "products alone": name,
            "MACs that spikes replace": f"{account['spiking_macs']:,}",
            "MACs that stay": f"{account['other_macs']:,}",
            "r": f"{account['rate']:.3f}",
            **{f"{cost}": f"{own['times_less']:.2f} x less" for cost, own in account["estimates"].items()},
        }
        for name, account in found.items()
    ]
    output.table(rows, title="ESTIMATED energy of the products alone, dense over spiking, in the papers' way")
    prices = next(iter(found.values()))["estimates"]
    constants = ", ".join(f"{own['mac']:.3g} and {own['ac']:.3g} pJ ({name})" for name, own in prices.items())
    output.say(
        f"r: additions for each MAC that spikes replace. A MAC and an addition: {constants}. In none of these: "
        "neurons, memory traffic, norms, gates, biases, functions. The first table has more of them.",
        "dim",
    )


def _show_attention(output: Output, found: dict[str, Any]) -> None:
    """Spiking self-attention beside dense attention: counted in full, and by the formula of papers."""
    counted, formula = found["counted"], found["formula"]
    output.say()
    title = "ESTIMATED, attention, less than dense"
    rows = [
        {
            title: name,
            "MAC, addition (pJ)": f"{own['mac']:.3g}, {own['ac']:.3g}",
            "papers' formula": f"{own['reduction']:.2%}",
            "counted, quadratic": f"{counted['estimates'][name]['reduction_quadratic']:.2%}",
            "counted, recurrent": f"{counted['estimates'][name]['reduction_recurrent']:.2%}",
        }
        for name, own in formula["estimates"].items()
    ]
    output.table(rows)
    least, largest = formula["paper"]["reduction"]
    output.say(
        f"ESTIMATED. The formula is 1 - T fr E_AC / E_MAC with T fr = {formula['steps_times_rate']:.3f}, measured on "
        "queries, keys and values. It leaves out softmax, LIF updates, row factors and memory, and is not what runs; "
        "'counted' has all of these but memory and the softmax's exponentials. arXiv 2510.00133 states "
        f"{least:.2%} to {largest:.2%}, by constants that were not found.",
        "dim",
    )
    output.say()
    output.table(
        [
            {
                "attention": site,
                "T": own["steps"],
                **{f"rate, {name}": f"{rate:.1%}" for name, rate in own["rates"].items()},
                "fr": f"{own['rate']:.1%}",
                **{name: f"{number:,}" for name, number in own["additions"].items()},
            }
            for site, own in found["layers"].items()
        ],
        title="rates of its neurons, and additions of both forms: scores and context, or state and reads",
    )


def _show_effort(output: Output, ace: dict[str, Any]) -> None:
    """Arithmetic computation effort, the measure of the paper on SpikeLLM."""
    output.say()
    label = "ACE of linear layers"
    rows = [
        {label: name, "a token": f"{ace['per_token'][name]:,.0f}", "a MAC": f"{value:.2f}"}
        for name, value in ace["per_mac"].items()
    ]
    output.table(rows)
    output.say(
        "ACE: bits of the weight x bits of the activation x steps, real numbers 16 bits. It sees neither silence nor "
        f"memory. Additions alone stand for {ace['additive_fraction']:.1%} of the multiply-accumulates of the "
        "converted linear layers.",
        "dim",
    )


def _energy_row(row: dict[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {_TITLE: row["ESTIMATED"]}
    cells |= {name: round(row[key], 2) for name in _NETWORKS if (key := f"{name} uJ/token") in row}
    return cells | {key: f"{row[key]:.2f} x" for name in _RIVALS if (key := f"vs {name}") in row}


def verdict(report: EnergyReport) -> str:
    """One honest line for each rival: under how many of the estimates does the spiking network cost less?

    Of what runs: the papers' convention decides nothing.
    """
    lines = []
    rows = [row for row in report.summary() if "accounting" not in row]
    for rival, name in _RIVALS.items():
        ratios = [row[f"vs {rival}"] for row in rows if f"vs {rival}" in row]
        if not ratios:
            continue
        wins = sum(ratio < 1 for ratio in ratios)
        how = {0: "loses to", len(ratios): "beats"}.get(wins, f"beats, in {wins} of {len(ratios)} estimates,")
        span = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"The spiking network {how} {name}: {span} times its energy (ESTIMATED).")
    return "\n".join(lines)
