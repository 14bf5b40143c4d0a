"""What it costs, on the training's thread, to look for secrets in what is logged.

    python benchmarks/redaction.py [--short]

For tables of numbers, of numbers and file names, and for a text of 64 KiB: the time of redaction,
and how many times a plain scan that is, in the same run. A plain scan is one search for one word in
all of the text.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Callable
from typing import Any

from trainbus import redaction
from trainbus.events import TableLogged, TextLogged

_COLUMNS = 5
_TEXT = 64 * 1024
_WORDS = ["epoch", "loss", "of", "the", "validation", "fell", "while", "images", "were", "resized"]


def cpu_ms(call: Callable[[], object], times: int = 5) -> float:
    """Return the least CPU time of a call in ms."""
    took = []
    for _ in range(times):
        begun = time.process_time()
        call()
        took.append(time.process_time() - begun)
    return 1e3 * min(took)


def events(cells: int) -> dict[str, Any]:
    """Return what is looked at, by what it is; none of it has a secret, nor is like one."""
    chance = random.Random(0)
    count = cells // _COLUMNS
    numbers = [[chance.random() for _ in range(_COLUMNS)] for _ in range(count)]
    mixed = [
        [n, chance.random(), chance.random(), f"img_{n:06}.jpg", chance.choice(["cat", "dog"])]
        for n in range(count)
    ]
    text = " ".join(chance.choices(_WORDS, k=_TEXT // 4))[:_TEXT]
    columns = [f"column {n}" for n in range(_COLUMNS)]
    return {
        f"table of {cells:,} numbers": TableLogged(key="t", columns=columns, rows=numbers),
        f"table of {cells:,} cells, names in it": TableLogged(key="t", columns=columns, rows=mixed),
        f"text of {_TEXT:,} bytes": TextLogged(key="t", text=text),
    }


def text_of(event: Any) -> str:
    """Return an event's content as one text."""
    if isinstance(event, TextLogged):
        return event.text
    return "\n".join(str(cell) for row in event.rows for cell in row)


def main(cells: int = 50_000) -> None:
    """Print one line for each of them."""
    word = re.compile("(?i:password)")
    for name, event in events(cells).items():
        whole = text_of(event)
        scan = cpu_ms(lambda whole=whole: word.search(whole))  # type: ignore[misc]
        ours = cpu_ms(lambda event=event: redaction.event(event))  # type: ignore[misc]
        ratio = ours / max(scan, 1e-3)
        print(f"{name:<40} {ours:8.2f} ms, {ratio:6.1f} times a plain scan")


if __name__ == "__main__":
    main(500 if "--short" in sys.argv else 50_000)
