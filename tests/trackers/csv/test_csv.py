"""The `csv` sink, read back by the standard library and by pandas."""

from __future__ import annotations

import csv
import json
import math
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pytest
from trainbus.sinks.csv import CsvOptions, CsvSink

import trainbus
from trainbus import Bus, RunInfo, SinkError, config
from trainbus.events import (
    Best,
    ConfusionMatrixLogged,
    CurveLogged,
    EpochEnded,
    Event,
    Failure,
    HistogramLogged,
    MetricsLogged,
    ModelDescribed,
    ParamsUpdated,
    Record,
    RunEnded,
    RunStarted,
    TableLogged,
)
from trainbus.testing import SinkConformance


class TestCsvSink(SinkConformance):
    """The sink passes the suite."""

    heavy = ("pandas", "matplotlib", "PIL", "yaml", "rich")
    stores = (
        ParamsUpdated,
        ModelDescribed,
        MetricsLogged,
        CurveLogged,
        ConfusionMatrixLogged,
        TableLogged,
        HistogramLogged,
        RunEnded,
    )

    def make(self, folder: Path) -> CsvSink:
        return CsvSink(CsvOptions(dir=str(folder / "{run}")))

    def read(self, folder: Path) -> object:
        return {str(p.relative_to(folder)): lines(p) for p in sorted(folder.rglob("*.csv"))}


RUN = RunInfo(id="run", started=RunStarted())


def lines(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def records(*events: Event, attempt: int = 1, begin: float = 100.0) -> list[Record]:
    """Return records a second apart."""
    return [
        Record(seq=seq, run="run", time=begin + seq - 1, event=event, attempt=attempt)
        for seq, event in enumerate(events, 1)
    ]


def sink_for(folder: Path, *, attempt: int = 1, reopened: bool = False) -> CsvSink:
    sink = CsvSink(CsvOptions(dir=str(folder / "{run}")))
    sink.open(RunInfo(id="run", started=RunStarted(), attempt=attempt, reopened=reopened))
    return sink


def written(folder: Path, *events: Event) -> Path:
    sink = sink_for(folder)
    sink.write(records(RunStarted(), *events))
    sink.close()
    return folder / "run"


def metrics(epoch: int | None = None, phase: Any = "train", **values: Any) -> MetricsLogged:
    """Return metrics of an epoch, or of the `step` in the values."""
    step = values.pop("step", None)
    return MetricsLogged(values=values, phase=phase, epoch=epoch, step=step)


def pairs(path: Path) -> dict[str, str]:
    header, *rows = lines(path)
    assert ["name", "value"] == header
    assert len(rows) == len(dict(rows))
    return dict(rows)


# Metrics ------------------------------------------------------------------------------------------


def test_an_epoch_is_a_row(tmp_path: Path) -> None:
    """What is logged in an epoch is one row: epochs from 1, seconds since the start, the values."""
    folder = written(
        tmp_path,
        metrics(0, **{"train/loss": 0.1}),
        metrics(0, lr=0.01),
        metrics(0, "validation", acc=0.5),
        metrics(1, **{"train/loss": 1 / 3}),
        metrics(1, lr=0.02),
    )
    assert [
        ["epoch", "time", "train/loss", "lr"],
        ["1", "2.0", "0.1", "0.01"],
        ["2", "5.0", repr(1 / 3), "0.02"],
    ] == lines(folder / "train.csv")
    assert [["epoch", "time", "acc"], ["1", "3.0", "0.5"]] == lines(folder / "validation.csv")


def test_a_later_column_leaves_earlier_rows_as_they_are(tmp_path: Path) -> None:
    """Rows before a new column are empty there, whenever they were written."""
    sink = sink_for(tmp_path)
    for record in records(RunStarted(), metrics(0, a=1.0), metrics(1, a=2.0), metrics(2, b=3.0)):
        sink.write([record])
    sink.close()
    rows = [line[:1] + line[2:] for line in lines(tmp_path / "run" / "train.csv")]
    assert [["epoch", "a", "b"], ["1", "1.0", ""], ["2", "2.0", ""], ["3", "", "3.0"]] == rows


def test_steps_have_a_file_of_their_own(tmp_path: Path) -> None:
    """Values of steps are rows by step, with the epoch that they lie in."""
    events = [metrics(0, step=1, loss=3.0), metrics(0, step=2, loss=2.0), metrics(step=3, loss=1.0)]
    folder = written(tmp_path, *events, metrics(0, loss=2.5))
    assert [
        ["step", "epoch", "time", "loss"],
        ["1", "1", "1.0", "3.0"],
        ["2", "1", "2.0", "2.0"],
        ["3", "", "3.0", "1.0"],
    ] == lines(folder / "train_steps.csv")
    assert [["epoch", "time", "loss"], ["1", "4.0", "2.5"]] == lines(folder / "train.csv")


def test_final_evaluations_are_set_apart(tmp_path: Path) -> None:
    """What was measured of the chosen weights has its own file, and no row among the epochs."""
    final = MetricsLogged(values={"acc": 0.75}, phase="test", final=True)
    folder = written(tmp_path, metrics(0, "test", acc=0.5), final)
    expected = [["phase", "epoch", "time", "acc"], ["test", "", "2.0", "0.75"]]
    assert expected == lines(folder / "final.csv")
    assert [["epoch", "time", "acc"], ["1", "1.0", "0.5"]] == lines(folder / "test.csv")


def test_numbers_read_back_exactly(tmp_path: Path) -> None:
    """Every float comes back to the last bit; pandas knows NaN and the infinities."""
    values = {
        "nan": math.nan,
        "inf": math.inf,
        "minus": -math.inf,
        "zero": -0.0,
        "small": 5e-324,
        "large": 1.7976931348623157e308,
    }
    path = written(tmp_path, metrics(0, **values)) / "train.csv"
    read = pd.read_csv(path, dtype=str, keep_default_na=False).iloc[0]
    assert [True, True, True] == pd.read_csv(path)[["nan", "inf", "minus"]].isin(
        [math.nan, math.inf, -math.inf]
    ).iloc[0].tolist()
    assert ["NaN", "inf", "-inf", "-0.0", "5e-324", "1.7976931348623157e+308"] == lines(path)[1][2:]
    assert all(repr(value) == repr(float(read[name])) for name, value in values.items())


@pytest.mark.parametrize(
    "names",
    [
        ("a,b", 'c"d', "e\nf", "g;h", "=SUM(A1)", "'=SUM(A1)"),
        ("métrique/µ", "µ", "日本", "\u2028"),
        ("epoch", "time", "step", "phase", "", " "),
        ("x" * 3000, "x" * 3001),
        ("a\0b", "a\x01b", "a_b"),
    ],
)
def test_every_name_is_a_column(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Names with anything in them are columns, and no two become one."""
    values = {name: float(number) for number, name in enumerate(names)}
    event = MetricsLogged(values=values, phase="train", epoch=0)
    header, row = lines(written(tmp_path, event) / "train.csv")
    assert len(names) + 2 == len(set(header)) == len(header)
    assert list(map(str, values.values())) == row[2:]
    for name in set(names) & {"a,b", 'c"d', "g;h", "'=SUM(A1)", "métrique/µ", "µ", "日本", "a_b"}:
        assert values[name] == float(row[header.index(name)])


def test_every_phase_is_a_file_in_the_folder(tmp_path: Path) -> None:
    """Phases of any name have files of their own, none of which is one of ours or elsewhere."""
    phases = ["train", "Train", "final", "run", "params", "a/b", "../up", "", "a_b", ".hidden"]
    phases += ["train_steps", "x" * 300]
    by_step = metrics(phase="train", step=1, of=100.0)
    folder = written(tmp_path, by_step, *(metrics(0, p, of=i) for i, p in enumerate(phases)))
    files = [p for p in folder.rglob("*.csv") if "of" in lines(p)[0]]
    assert len(phases) + 1 == len(files) == len({path.name.lower() for path in files})
    assert [folder] == list(tmp_path.iterdir())
    assert [*range(len(phases)), 100] == sorted(float(lines(path)[1][-1]) for path in files)


def test_values_without_epoch_or_step_are_rows_by_time(tmp_path: Path) -> None:
    """Where nothing is counted, each call is a row with its time."""
    folder = written(tmp_path, *(metrics(phase="system", gpu=float(i)) for i in range(3)))
    expected = [["", f"{i}.0", f"{i - 1}.0"] for i in (1, 2, 3)]
    assert expected == lines(folder / "system.csv")[1:]


def test_an_epoch_that_is_redone_replaces_its_row(tmp_path: Path) -> None:
    """Values of an epoch that was given up are replaced by those that count."""
    folder = written(
        tmp_path,
        metrics(0, loss=9.0),
        EpochEnded(epoch=0, outcome="recovered"),
        metrics(0, loss=1.0),
    )
    assert [["1", "3.0", "1.0"]] == lines(folder / "train.csv")[1:]


def test_many_steps_are_appended_and_not_written_again(tmp_path: Path) -> None:
    """Ten thousand steps in small batches take no time that grows with the file."""
    sink = sink_for(tmp_path)
    made = records(RunStarted(), *(metrics(step=i, loss=float(i)) for i in range(10_000)))
    path = tmp_path / "run" / "train_steps.csv"
    sink.write(made[:100])
    inode = path.stat().st_ino
    for start in range(100, len(made), 100):
        sink.write(made[start : start + 100])
    sink.close()
    assert inode == path.stat().st_ino
    assert list(range(10_000)) == pd.read_csv(path)["loss"].tolist()


def test_a_long_file_keeps_every_change(tmp_path: Path) -> None:
    """Steps that are redone far behind the end, new columns and late steps are all in their rows.

    Also where a process is killed in between.
    """
    path = tmp_path / "run" / "train_steps.csv"

    def feed(sink: CsvSink, *events: MetricsLogged, attempt: int) -> None:
        made = records(RunStarted(), *events, attempt=attempt)
        for start in range(0, len(made), 250):
            sink.write(made[start : start + 250])

    steps = [step for step in range(6000) if step != 77]
    first = sink_for(tmp_path)
    feed(first, *(metrics(step=step, loss=float(step)) for step in steps), attempt=1)
    killed = sink_for(tmp_path, attempt=2)
    again = [metrics(step=step, loss=-float(step)) for step in range(1000, 3500)]
    feed(killed, metrics(step=77, loss=0.5), *again, attempt=2)
    last = sink_for(tmp_path, attempt=3)
    feed(last, metrics(step=5990, lr=0.1), metrics(step=5, lr=0.2), attempt=3)
    last.close()
    table = pd.read_csv(path).set_index("step")
    assert ["epoch", "time", "loss", "lr"] == [*table.columns]
    redone = {step: -float(step) for step in range(1000, 3500)}
    expected = {**{step: float(step) for step in steps}, **redone, 77: 0.5}
    assert expected == table["loss"].to_dict()
    assert {5990: 0.1, 5: 0.2} == table["lr"].dropna().to_dict()
    assert [*steps, 77] == [*table.index]
    assert [path.name] == [p.name for p in path.parent.iterdir() if "train_steps" in p.name]


# Params and the rest ------------------------------------------------------------------------------


def test_params_are_pairs(tmp_path: Path) -> None:
    """Nested parameters have dotted names; later ones replace them; long ones are whole."""
    started = RunStarted(
        params={"lr": 0.1, "type": "sgd", "a": {"b": [1, None]}, "text": "x" * 9999}
    )
    sink = sink_for(tmp_path)
    sink.write(records(started, ParamsUpdated(params={"lr": 0.2, "c\nd": True, "none": None})))
    sink.close()
    assert {
        "lr": "0.2",
        "type": "sgd",
        "a.b": "[1, None]",
        "text": "x" * 9999,
        "c\nd": "True",
        "none": "",
    } == pairs(tmp_path / "run" / "params.csv")


def test_what_readers_of_csv_refuse_is_left_out(tmp_path: Path) -> None:
    """Text of any kind and length leaves files that the next sink of the run can read."""
    odd = {"long": "x" * 300_000, "odd": "a\0b\rc\r\nd\ud800", "quoted": 'a,"b"\n', "": "no name"}
    sink = sink_for(tmp_path)
    sink.write(records(RunStarted(params=odd)))
    sink.close()
    sink_for(tmp_path, attempt=2).write(records(ParamsUpdated(params={"n": 1}), attempt=2))
    found = pairs(tmp_path / "run" / "params.csv")
    assert ["x" * 100_000, "a\ufffdb\nc\nd\ufffd", 'a,"b"\n', "no name", "1"] == [*found.values()]


_FORMULAS = ["=cmd|' /C calc'!A0", "+1+cmd|'!A", "-2+3", "@SUM(1)", "\t=1", "\uff1d1"]


@pytest.mark.parametrize("escapes", [True, False])
def test_no_text_is_a_formula(tmp_path: Path, escapes: bool) -> None:
    """Names, values and cells that a spreadsheet would run are marked as text, numbers never."""
    sink = CsvSink(CsvOptions(dir=str(tmp_path / "{run}"), escape_formulas=escapes))
    sink.open(RUN)
    rows = [[text, -0.5, -3, "-0.5", "+1e5", "a=b", "x@y"] for text in _FORMULAS]
    sink.write(
        records(
            RunStarted(name="=1+1", params={text: text for text in _FORMULAS}),
            MetricsLogged(values=dict.fromkeys(_FORMULAS, -1.0), phase="train", epoch=0),
            TableLogged(key="t", columns=["=a", "b", "c", "d", "e", "f", "g"], rows=rows),
            ConfusionMatrixLogged(key="m", matrix=np.array([[-1]]), classes=["=c"]),
        )
    )
    sink.close()
    folder, mark = tmp_path / "run", "'" if escapes else ""
    cells = [f"{mark}{text}" for text in _FORMULAS]
    table = [[cell, "-0.5", "-3", "-0.5", "+1e5", "a=b", "x@y"] for cell in cells]
    assert [[f"{mark}=a", *"bcdefg"], *table] == lines(folder / "tables" / "t.csv")
    assert [["true/predicted", f"{mark}=c"], [f"{mark}=c", "-1"]] == lines(
        folder / "tables" / "m.csv"
    )
    assert f"{mark}=1+1" == pairs(folder / "run.csv")["name"]
    assert cells == [*pairs(folder / "params.csv").values()]
    header, row = lines(folder / "train.csv")
    assert ["-1.0"] * len(cells) == row[2:]
    if escapes:
        names = [*header[2:], *pairs(folder / "params.csv")]
        assert [] == [n for n in names if not n.startswith("'") and n[0] in "=+-@\t\uff1d"]


def test_run_csv_says_what_the_run_was(tmp_path: Path) -> None:
    """Name, model, status, reason, error and the best value are pairs."""
    sink = sink_for(tmp_path)
    error = Failure(type="ValueError", message="no", traceback="a\nb")
    best = Best(metric="acc", value=0.5, epoch=3)
    events: list[Event] = [
        RunStarted(name="n", project="p", tags=["a", "b"]),
        ModelDescribed(parameters=2**40),
        RunEnded(status="failed", reason="ValueError: no", error=error, best=best),
    ]
    sink.write(records(*events))
    sink.close()
    assert {
        "began": "100.0",
        "run": "run",
        "name": "n",
        "project": "p",
        "tags": "['a', 'b']",
        "attempt": "1",
        "status": "failed",
        "model.parameters": str(2**40),
        "reason": "ValueError: no",
        "error.type": "ValueError",
        "error.message": "no",
        "error.traceback": "a\nb",
        "best.metric": "acc",
        "best.value": "0.5",
        "best.epoch": "3",
        "seconds": "2.0",
    } == pairs(tmp_path / "run" / "run.csv")


@pytest.mark.parametrize("status", ["finished", "failed", "stopped"])
def test_the_end_is_the_status(tmp_path: Path, status: Any) -> None:
    """Each end is stored as it was."""
    folder = written(tmp_path, RunEnded(status=status))
    assert status == pairs(folder / "run.csv")["status"]


def test_tables_curves_matrices_and_histograms_are_files(tmp_path: Path) -> None:
    """Each key has a file with its latest version, also where keys look alike."""
    x = np.array([0.0, 1.0])
    folder = written(
        tmp_path,
        TableLogged(key="t", columns=["old"], rows=[[1], [2]]),
        TableLogged(key="t", columns=["a", "b"], rows=[["x,y", None], ["n", math.nan]]),
        TableLogged(key="T", columns=[], rows=[]),
        CurveLogged(key="c", x=x, y=np.stack([x, x * 2]), classes=["i", "j"], x_label="recall"),
        ConfusionMatrixLogged(key="m", matrix=np.array([[3, 1], [0, 2]]), classes=["i", "j"]),
        HistogramLogged(key="h", counts=np.array([4, 5]), edges=np.array([0.0, 0.5, 1.0])),
    )
    tables = folder / "tables"
    assert [["a", "b"], ["x,y", ""], ["n", "NaN"]] == lines(tables / "t.csv")
    expected = [["recall", "i", "j"], ["0.0", "0.0", "0.0"], ["1.0", "1.0", "2.0"]]
    assert expected == lines(tables / "c.csv")
    expected = [["true/predicted", "i", "j"], ["i", "3", "1"], ["j", "0", "2"]]
    assert expected == lines(tables / "m.csv")
    expected = [["from", "to", "count"], ["0.0", "0.5", "4.0"], ["0.5", "1.0", "5.0"]]
    assert expected == lines(tables / "h.csv")
    assert 5 == len({path.name.lower() for path in tables.iterdir()})


# Going on -----------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_in_its_files(tmp_path: Path) -> None:
    """A second attempt adds rows, replaces those that it redoes, and takes back the earlier end."""
    failed = RunEnded(status="failed", reason="no", error=Failure(type="E", message="m"))
    first = sink_for(tmp_path)
    first.write(records(RunStarted(), metrics(0, loss=3.0), metrics(1, loss=2.0), failed))
    first.close()
    second = sink_for(tmp_path, attempt=2)
    made = records(
        *(RunStarted(), metrics(1, loss=1.5), metrics(2, loss=1.0), RunEnded(status="finished")),
        attempt=2,
        begin=200.0,
    )
    second.write(made)
    second.close()
    expected = [["1", "1.0", "3.0"], ["2", "101.0", "1.5"], ["3", "102.0", "1.0"]]
    assert expected == lines(tmp_path / "run" / "train.csv")[1:]
    about = pairs(tmp_path / "run" / "run.csv")
    assert ("finished", "2", "", "") == (
        *(about["status"], about["attempt"], about["reason"], about["error.type"]),
    )


@pytest.mark.parametrize("cut", range(1, 8))
def test_what_a_killed_process_took_is_there_once(tmp_path: Path, cut: int) -> None:
    """A sink that was never closed is followed by one that gets the last records again."""
    made = records(
        RunStarted(),
        metrics(0, loss=3.0),
        metrics(phase="system", gpu=1.0),
        metrics(phase="system", gpu=2.0),
        metrics(0, step=1, loss=3.0),
        metrics(0, loss=4.0, lr=0.1),
        RunEnded(status="finished"),
    )
    sink_for(tmp_path / "killed").write(made[:cut])
    again = sink_for(tmp_path / "killed", reopened=True)
    again.write(made[max(cut - 3, 0) :])
    again.close()
    whole = sink_for(tmp_path / "whole")
    whole.write(made)
    whole.close()
    assert TestCsvSink().read(tmp_path / "whole") == TestCsvSink().read(tmp_path / "killed")


def test_a_batch_whose_position_was_not_kept_changes_nothing_twice(tmp_path: Path) -> None:
    """Killed between the rows and the note of their position, the batch comes again as it was."""
    made = records(
        RunStarted(), metrics(0, a=1.0), metrics(phase="system", b=1.0), metrics(0, a=2.0)
    )
    sink_for(tmp_path).write(made)
    before = TestCsvSink().read(tmp_path)
    (tmp_path / "run" / ".trainbus-csv.json").unlink()
    sink_for(tmp_path, reopened=True).write(made)
    assert before == TestCsvSink().read(tmp_path)


@pytest.mark.parametrize("rest", [b"2,2.0,2", b"2,2.0,\xc3"])
def test_a_line_that_a_crash_cut_short_costs_itself(tmp_path: Path, rest: bytes) -> None:
    """A torn last line is skipped, and new rows follow the complete ones."""
    folder = written(tmp_path, metrics(0, loss=1.0))
    path = folder / "train.csv"
    path.write_bytes(path.read_bytes() + rest)
    sink = sink_for(tmp_path, attempt=2)
    sink.write(records(RunStarted(), metrics(2, loss=3.0), attempt=2))
    sink.close()
    assert ["1", "3"] == [line[0] for line in lines(path)[1:]]


def test_a_full_disk_costs_no_row_that_was_written(tmp_path: Path) -> None:
    """A batch that does not fit is rejected, and is stored once when it is retried with room."""
    sink = sink_for(tmp_path)
    made = records(RunStarted(), *(metrics(i, loss=float(i)) for i in range(400)))
    sink.write(made[:3])
    path = tmp_path / "run" / "train.csv"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            sink.write(made[3:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert ["0.0", "1.0"] == [line[2] for line in lines(path)[1:3]]
    sink.write(made[3:])
    sink.close()
    assert list(range(400)) == pd.read_csv(path)["loss"].tolist()


# Places and mistakes ------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["runs/mine", ""])
def test_the_folder_must_be_the_runs_own(folder: str) -> None:
    """A folder that several runs would share is rejected when the configuration is read."""
    text = json.dumps({"sinks": {"c": {"type": "csv", "dir": folder}}})
    with pytest.raises(
        trainbus.ConfigError, match=r"c\.dir: found .*, expected a path with `\{run\}`"
    ):
        config.loads(text)


def test_says_what_can_not_be_written(tmp_path: Path) -> None:
    """The error names a folder that can't be created, the reason, and what to change."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SinkError, match=r"can't write .*/file/run: .*; set another `dir`"):
        sink_for(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("run", b"a,b\n1,2\n", "expected the columns .* in .*run.csv; move the file away"),
        ("run", b"\xff\n", "found no CSV in .*run.csv"),
        ("run", b"name,value\nbegan,yesterday\n", "expected seconds as `began`"),
    ],
)
def test_files_of_others_are_left_alone(
    tmp_path: Path, name: str, data: bytes, expected: str
) -> None:
    """A file that the sink did not write is an error that names it, and stays as it is."""
    path = tmp_path / "run" / f"{name}.csv"
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.raises(SinkError, match=expected):
        sink_for(tmp_path)
    assert data == path.read_bytes()


def test_a_configured_bus_feeds_it(tmp_path: Path) -> None:
    """A run of a bus from YAML, in the sidecar process, leaves its files where it was told to."""
    text = f"sinks:\n  table:\n    type: csv\n    dir: {tmp_path}/{{run}}-csv\n"
    with config.loads(text) as bus, bus.run(params={"lr": 0.1}) as run:
        for epoch in run.epochs(2):
            run.log({"loss": float(epoch)})
    (report,) = bus.receipts[0].sinks
    assert (0, 0, None) == (report.dead, report.pending, report.error)
    (folder,) = tmp_path.glob("*-csv")
    assert str(folder) == report.location
    assert [("1", "0.0"), ("2", "1.0")] == [(r[0], r[2]) for r in lines(folder / "train.csv")[1:]]
    assert {"lr": "0.1"} == pairs(folder / "params.csv")


def test_two_buses_one_after_another_are_two_folders(tmp_path: Path) -> None:
    """Each run has a folder of its own."""
    sink = CsvSink(CsvOptions(dir=str(tmp_path / "{run}")))
    with Bus({"c": sink}, on_receipt=lambda receipt: None) as bus:
        for number in range(2):
            with bus.run() as run:
                run.log({"loss": number}, epoch=0)
    found = sorted(lines(p)[1][2] for p in tmp_path.glob("*/train.csv"))
    assert ["0.0", "1.0"] == found
