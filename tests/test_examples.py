"""The example scripts run, on a tiny model."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
WORDS = {
    "convert_in_memory": ["modules spike", "bit for bit the same"],
    "convert_at_load": ["modules spike", "bit for bit the same", "step by step"],
    "energy": ["signed_digit", "ESTIMATED"],
    "fas": ["QCFS network", "T = 8, calibrated", "saved to"],
    "spikellm": ["W5A5, T = 1", "T = 2 for 10%", "bit operations a MAC", "saved to"],
}


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(WORDS)


@pytest.mark.parametrize("name", WORDS)
def test_example(name, tiny_llama, tmp_path, capsys):
    tiny_llama(context=128).save_pretrained(tmp_path / "dense")
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    main(*[str(tmp_path / "dense"), str(tmp_path / "out")][: 1 if name == "energy" else 2])
    printed = capsys.readouterr().out
    for words in WORDS[name]:
        assert words in printed
