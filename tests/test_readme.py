"""The README's Python block runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_python_block_runs(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "raster.png").stat().st_size > 0
    assert (tmp_path / "llama-las" / "spikeform.json").is_file()
    ratio = float(capsys.readouterr().out.splitlines()[-3].split()[0])
    assert abs(ratio - 1) < 1e-3
