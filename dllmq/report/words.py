"""How long names and sizes are written, in tables, figures and on the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable


def folded(text: str, width: int) -> str:
    """The whole text in lines of at most `width`, broken between words, behind a separator, or anywhere."""
    words = [part for word in text.split(" ") for part in _parts(word, width)]
    lines = [""]
    for word in words:
        if len(lines[-1] + word.rstrip()) > width and lines[-1]:
            lines.append("")
        lines[-1] += word
    return "\n".join(line.rstrip() for line in lines)


def _parts(word: str, width: int) -> list[str]:
    """Pieces of a word that must not be broken further, the last one with the space behind the word."""
    pieces = [word] if len(word) <= width else re.findall(r"[^=,/_.-]+[=,/_.-]*|[=,/_.-]+", word)
    pieces = [piece[i : i + width] for piece in pieces for i in range(0, len(piece), width)]
    return [*pieces[:-1], f"{pieces[-1]} "] if pieces else []


def byte_unit(sizes: Iterable[float | int | None]) -> tuple[str, int]:
    """The unit in which a column of sizes is written, and its bytes: MiB, or GiB from ten of them on."""
    largest = max((size for size in sizes if size is not None), default=0)
    return ("GiB", 2**30) if largest >= 10 * 2**30 else ("MiB", 2**20)
