"""The generated parts of the README: what stands between two markers is written anew."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def write(begin: str, end: str, content: str) -> None:
    """Puts ``content`` between the two markers."""
    text = README.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"README.md has lost its markers {begin} and {end}")
    block = f"{begin}\n{content}\n{end}"
    text = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: block, text, flags=re.DOTALL)
    README.write_text(text, encoding="utf-8")
