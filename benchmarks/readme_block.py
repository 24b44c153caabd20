"""The generated parts of the README and of other pages: what stands between two markers is written anew."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def write(begin: str, end: str, content: str, page: Path = README) -> None:
    """Puts ``content`` between the two markers."""
    text = page.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"{page.name} has lost its markers {begin} and {end}")
    block = f"{begin}\n{content}\n{end}"
    text = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: block, text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")
