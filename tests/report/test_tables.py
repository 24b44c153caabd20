import io
import json

from spikeform.report.tables import cell, lines, show, to_json

ROWS = [{"site": "layer.0", "spikes": 12345, "rate": 0.123456}, {"site": "b", "spikes": 7, "note": None}]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_are_aligned() -> None:
    assert lines(ROWS, ["site", "spikes", "rate"]) == [
        "site     spikes    rate",
        "layer.0  12,345  0.1235",
        "b             7",
    ]
    out = io.StringIO()
    show(ROWS, title="title", file=out)
    assert out.getvalue().splitlines()[0] == "title"
    assert "\x1b" not in out.getvalue()


def test_terminal_gets_a_table() -> None:
    out = Terminal()
    show([{"site": "[red]x"}], title="t", file=out)
    assert "[red]x" in out.getvalue()
    assert "─" in out.getvalue() or "━" in out.getvalue()


def test_cells() -> None:
    assert [cell(v) for v in (None, True, 3.0, 1234567.0, [1.5, 2.0], "x")] == [
        "",
        "True",
        "3",
        "1.235e+06",
        "1.5 2",
        "x",
    ]


def test_json() -> None:
    class Thing:
        def to_dict(self) -> dict:
            return {"a": float("nan"), "b": (1, 2)}

    assert json.loads(to_json([Thing(), None])) == [{"a": None, "b": [1, 2]}, None]


def test_empty() -> None:
    assert lines([], ["a", "b"]) == ["a  b"]
