"""The table of docs/adapters/README.md: which events each example really supplied.

Run as a script, it runs every example and writes the table into the page.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree, ignore_patterns

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))

from support import train  # noqa: E402  found by the line above
from trainbus.events import EVENT_TYPES, MetricsLogged, Record, decode, event_name  # noqa: E402

PAGE = ROOT / "docs" / "adapters" / "README.md"
SHIM = ROOT / "tests" / "support" / "torchvision_cpu.py"
BEGIN, END = "<!-- made by `make docs` -->\n", "<!-- end -->\n"
PHASES = ("train", "validation")
NAMES = [str(cls.__struct_config__.tag) for cls in EVENT_TYPES]
ROWS = [
    row
    for name in NAMES
    for row in ([f"{name} ({p})" for p in PHASES] if name == "metrics.logged" else [name])
]


def examples() -> list[Path]:
    """Return the examples that have one table column each."""
    return [*sorted((ROOT / "examples").glob("*_basic.py")), ROOT / "examples" / "plain_loop.py"]


def title(example: Path) -> str:
    """Return what the column of an example is called."""
    return example.stem.removesuffix("_basic").replace("plain_loop", "plain loop")


def run_script(script: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a folder with a copy of the examples and of their configuration."""
    for name in ("examples", "config"):
        copytree(ROOT / name, folder / name, ignore=ignore_patterns("__pycache__"))
    if "ultralytics" in script.read_text(encoding="utf-8"):
        train.save_below(folder)
    shim = [str(SHIM)] if find_spec("torch") else []
    return subprocess.run(
        [sys.executable, *shim, str(script)],
        cwd=folder,
        env=train.hermetic(folder) | {"KERAS_BACKEND": "torch", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


def records_of(folder: Path) -> list[Record]:
    """Return the records that `config/local.yaml` has left in a folder."""
    (path,) = (folder / "config" / "trainbus-runs").glob("*.jsonl")
    return [decode(line) for line in path.read_bytes().splitlines()]


def counted(records: list[Record]) -> Counter[str]:
    """Return how often each row of the table occurs."""
    found: Counter[str] = Counter()
    for record in records:
        name = event_name(record.event)
        if isinstance(record.event, MetricsLogged):
            name += f" ({record.event.phase})"
        found[name] += 1
    return found


def table(columns: dict[str, Counter[str]]) -> str:
    """Return the table, with a tick where an event was supplied."""
    titles = list(columns)
    lines = ["| event | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for row in ROWS:
        ticks = ["✔" if columns[column][row] else "" for column in titles]
        if any(ticks):
            lines.append(
                f"| `{row.split()[0]}`{row[len(row.split()[0]) :]} | {' | '.join(ticks)} |"
            )
    return "\n".join(lines) + "\n"


def shown() -> str:
    """Return the table that the page has."""
    found = re.search(f"{re.escape(BEGIN)}(.*?){re.escape(END)}", PAGE.read_text(), re.DOTALL)
    assert found is not None, f"{PAGE} has no lines {BEGIN!r} and {END!r}"
    return found[1]


def main() -> None:
    """Run every example, and write the table into the page."""
    columns = {}
    for example in examples():
        with tempfile.TemporaryDirectory() as folder:
            done = run_script(example, Path(folder))
            assert done.returncode == 0, done.stderr[-3000:]
            columns[title(example)] = counted(records_of(Path(folder)))
            print(f"{example.name}: {columns[title(example)].total()} events")
    old, new = (f"{BEGIN}{text}{END}" for text in (shown(), table(columns)))
    PAGE.write_text(PAGE.read_text().replace(old, new))


if __name__ == "__main__":
    main()
