"""The `html` sink: its data read as plain JSON, and its page looked at with a real browser."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from trainbus.sinks.html import HtmlOptions, HtmlSink, compare

import trainbus
from support import screenshots
from support.browser import Browser, chromium
from trainbus import RunInfo, SinkError, config
from trainbus.events import (
    AlertRaised,
    ArtifactLogged,
    Best,
    CheckpointSaved,
    ConfusionMatrixLogged,
    CurveLogged,
    EpochEnded,
    EpochStarted,
    Event,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    ModelDescribed,
    ParamsUpdated,
    Record,
    Resumed,
    RunEnded,
    RunStarted,
    TableLogged,
    TextLogged,
    ended_by,
)
from trainbus.testing import SinkConformance, sample_records
from trainbus.testing.samples import png

HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=alert(1)>\"'&\x1b[31m"


class TestConformance(SinkConformance):
    package = "plotly"
    extra = "html"
    heavy = ("matplotlib", "PIL")
    stores = (
        ParamsUpdated,
        ModelDescribed,
        EpochStarted,
        EpochEnded,
        MetricsLogged,
        ImageLogged,
        CurveLogged,
        ConfusionMatrixLogged,
        TableLogged,
        HistogramLogged,
        TextLogged,
        CheckpointSaved,
        ArtifactLogged,
        AlertRaised,
        RunEnded,
    )

    def make(self, folder: Path) -> HtmlSink:
        return HtmlSink(HtmlOptions(dir=str(folder / "{run}"), points=10, pictures=1))

    def read(self, folder: Path) -> object:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            str(path.relative_to(folder)): json.loads(path.read_bytes(), parse_constant=refuse)
            if path.suffix == ".json"
            else hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        }


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is no JSON")


def records(*events: Event, attempt: int = 1, run: str = "run") -> list[Record]:
    return [
        Record(seq=seq, run=run, time=1000.0 * attempt + seq, event=event, attempt=attempt)
        for seq, event in enumerate(events, 1)
    ]


def sink_for(folder: Path, *, run: str = "run", attempt: int = 1, **options: Any) -> HtmlSink:
    sink = HtmlSink(HtmlOptions(dir=str(folder / "{run}"), **options))
    sink.open(RunInfo(id=run, started=RunStarted(), attempt=attempt))
    return sink


def data_of(folder: Path) -> Any:
    return json.loads((folder / "data.json").read_bytes(), parse_constant=refuse)


def shown_in(page: Path) -> Any:
    """Return the data that a page carries."""
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1], parse_constant=refuse)


def log(folder: Path, *events: Event, **options: Any) -> Any:
    """Return the data of a page of these events."""
    sink = sink_for(folder, **options)
    sink.write(records(*events))
    sink.close()
    return data_of(folder / "run")


def metric(value: float, **about: Any) -> MetricsLogged:
    return MetricsLogged(**{"values": {"loss": value}, "phase": "train", **about})


# Data ---------------------------------------------------------------------------------------------


def test_metrics_stand_at_their_epoch_and_step(tmp_path: Path) -> None:
    """Values of epochs are at the epochs done, values of steps at their step, exactly."""
    epochs = [metric(value, epoch=i) for i, value in enumerate((0.1, math.nan, -math.inf, 5e-324))]
    data = log(tmp_path, RunStarted(), *epochs, metric(1 / 3, step=7, epoch=3))
    by_epoch, by_step = data["series"]
    assert ("epoch", [1, 2, 3, 4]) == (by_epoch["axis"], by_epoch["x"])
    assert [0.1, "NaN", "-Infinity", 5e-324] == by_epoch["y"]
    assert 2 == by_epoch["odd"]
    assert [[5e-324, 4], [0.1, 1]] == [by_epoch["low"], by_epoch["high"]]
    assert ("step", [7], [1 / 3]) == (by_step["axis"], by_step["x"], by_step["y"])
    assert data == shown_in(tmp_path / "run" / "index.html")["runs"][0]


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("train/box_loss", "box_loss"),
        ("val/box_loss", "box_loss"),
        ("eval_loss", "loss"),
        ("metrics/mAP50(B)", "metrics/mAP50(B)"),
        ("training", "training"),
        ("train/", "train/"),
    ],
)
def test_train_and_validation_share_a_chart(tmp_path: Path, name: str, base: str) -> None:
    """The name of a chart is the metric's without its phase."""
    data = log(tmp_path, MetricsLogged(values={name: 1.0}, phase="train", epoch=0))
    assert [base] == [series["base"] for series in data["series"]]


@pytest.mark.parametrize("count", [9, 10, 11, 1000, 1001])
def test_long_series_are_thinned(tmp_path: Path, count: int) -> None:
    """A long series keeps evenly spaced values and the last one, its lowest and its highest."""
    data = log(tmp_path, *(metric(float(-i), step=i) for i in range(count)), points=10)
    (series,) = data["series"]
    assert len(series["x"]) <= 10
    assert [0, count - 1] == [series["x"][0], series["x"][-1]]
    assert [float(-x) for x in series["x"]] == series["y"]
    assert 1 == len(set(np.diff(series["x"][:-1])) or {1})
    assert [[1.0 - count, count - 1], [0.0, 0]] == [series["low"], series["high"]]


def test_metrics_named_as_axes_are_metrics(tmp_path: Path) -> None:
    """Values named step, epoch or time are kept like all others."""
    values = {"step": 7.0, "epoch": 8.0, "time": 9.0}
    data = log(tmp_path, MetricsLogged(values=values, phase="train", epoch=1, step=3))
    assert values == {series["name"]: series["y"][0] for series in data["series"]}
    assert [[3]] * 3 == [series["x"] for series in data["series"]]


def test_many_metrics_share_a_bound(tmp_path: Path) -> None:
    """All metrics together keep a bounded number of values, however many there are."""
    values = dict.fromkeys(map(str, range(4000)), 0.5)
    events = (MetricsLogged(values=values, phase="train", step=i) for i in range(60))
    data = log(tmp_path, *events, points=2000)
    assert 4000 == len(data["series"])
    assert {50} == {max(len(series["x"]), 50) for series in data["series"]}


def test_values_that_go_back_are_bounded_too(tmp_path: Path) -> None:
    """Steps that come in any order are put in order, and thinned."""
    data = log(tmp_path, *(metric(1.0, step=i) for i in range(500, 0, -1)), points=10)
    (series,) = data["series"]
    assert len(series["x"]) <= 10
    assert sorted(series["x"]) == series["x"]


@pytest.mark.parametrize("outcome", ["retried", "recovered"])
def test_an_epoch_that_is_done_again_counts_once(tmp_path: Path, outcome: Any) -> None:
    """What was logged in an epoch that was given up is dropped, of steps as of epochs."""
    epochs: list[Event] = [
        EpochStarted(epoch=0),
        metric(3.0, epoch=0, step=4),
        EpochEnded(epoch=0, outcome="completed"),
        EpochStarted(epoch=1),
        metric(-9.0, epoch=1, step=7),
        metric(-9.0, epoch=1),
        EpochEnded(epoch=1, outcome=outcome),
        EpochStarted(epoch=1),
        metric(2.0, epoch=1, step=5),
    ]
    data = log(tmp_path, RunStarted(), *epochs)
    by_step, by_epoch = data["series"]
    assert ([4, 5], [3.0, 2.0], [2.0, 5]) == (by_step["x"], by_step["y"], by_step["low"])
    assert [] == by_epoch["x"]
    assert 1 == data["done"]


def epoch(number: int, value: float) -> list[Event]:
    return [
        EpochStarted(epoch=number),
        metric(value, epoch=number, step=number + 1),
        metric(value, epoch=number),
        EpochEnded(epoch=number, duration_s=2.0, outcome="completed"),
    ]


def test_a_resumed_run_continues_its_page(tmp_path: Path) -> None:
    """The second attempt replaces what it does again; the time between them does not count."""
    first = sink_for(tmp_path)
    start = RunStarted(params={"epochs": 4})
    first.write(records(start, *epoch(0, 1.0), *epoch(1, 9.0), *epoch(2, 9.0)))
    first.close()
    second = sink_for(tmp_path, attempt=2)
    again = RunStarted(params={"epochs": 4}, resumed=Resumed(epoch=1))
    second.write(records(again, *epoch(1, 2.0), attempt=2))
    second.close()
    data = data_of(tmp_path / "run")
    for series in data["series"]:
        assert ([1, 2], [1.0, 2.0]) == (series["x"], series["y"])
    assert (2, 4, 4.0) == (data["done"], data["epochs"], data["eta"])
    assert (12.0, 4.0) == (data["earlier"], data["last"] - data["first"])
    assert "running" == data["status"]


def test_a_killed_process_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """A new sink that is given the whole attempt again stores what one sink would have."""
    whole = sample_records(tmp_path / "samples")
    info = RunInfo(id=whole[0].run, started=RunStarted())
    once, killed = tmp_path / "once", tmp_path / "killed"
    for folder, batches in ((once, [whole]), (killed, [whole[:20], whole])):
        for batch in batches:
            sink = HtmlSink(HtmlOptions(dir=str(folder / "{run}")))
            sink.open(msgspec.structs.replace(info, reopened=batch is not batches[0]))
            sink.write(batch)
            if batch is whole:
                sink.close()
    assert data_of(once / whole[0].run) == data_of(killed / whole[0].run)
    names = [sorted(p.name for p in f.rglob("*") if p.is_file()) for f in (once, killed)]
    assert names[0] == names[1]


class Clock:
    """Seconds that pass at every look at the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: float) -> None:
        self.now, self.step = 0.0, step
        monkeypatch.setattr(time, "monotonic", self.monotonic)

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


def test_the_page_is_there_while_the_run_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start and each epoch's end are in the page without a flush."""
    clock = Clock(monkeypatch, 0.0)
    sink = sink_for(tmp_path)
    sink.write(records(RunStarted(name="live")))
    page = tmp_path / "run" / "index.html"
    assert "live" == shown_in(page)["runs"][0]["about"]["name"]
    clock.now += 1.0
    later = records(RunStarted(name="live"), *epoch(0, 1.0))
    sink.write(later)
    assert 1 == shown_in(page)["runs"][0]["done"]
    sink.close()


def test_a_page_that_takes_long_to_write_is_written_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pauses are long in proportion, and the page is complete in the end."""
    clock = Clock(monkeypatch, 1000.0)
    sink = sink_for(tmp_path)
    sink.write(records(RunStarted()))
    before = data_of(tmp_path / "run")
    clock.step = 0.0
    clock.now += 1000.0
    sink.write(records(RunStarted(), *epoch(0, 1.0)))
    assert before == data_of(tmp_path / "run")
    sink.close()
    assert 1 == data_of(tmp_path / "run")["done"]


def test_the_worst_class_is_shown(tmp_path: Path) -> None:
    """The most important column of a table by class decides; averages are not classes."""
    rows = [["all", 5, 0.1, 0.1], ["cat", 5, 0.9, 0.5], ["dog", 5, 0.2, 0.7], ["x", 0, None, None]]
    columns = ["class", "instances", "recall", "mAP50-95(B)"]
    data = log(tmp_path, TableLogged(key="per_class", columns=columns, rows=rows))
    worst = {"key": "per_class", "name": "cat", "metric": "mAP50-95(B)", "value": 0.5}
    assert worst == data["worst"]


def test_a_confusion_matrix_shows_the_worst_class_too(tmp_path: Path) -> None:
    """Without a table, it is the class with the lowest recall."""
    matrix = np.array([[3, 1, 0], [0, 4, 0], [9, 9, 0]])
    names = ["a", "b", "background"]
    data = log(tmp_path, ConfusionMatrixLogged(key="m", matrix=matrix, classes=names))
    assert {"key": "m", "name": "a", "metric": "recall", "value": 0.75} == data["worst"]
    assert matrix.tolist() == data["matrices"]["m"]["matrix"]


def test_the_best_epoch_is_known_before_the_end(tmp_path: Path) -> None:
    """The trainer's goals say which value is best; the best of `RunEnded` takes precedence."""
    started = RunStarted(goals={"metrics/*": "max"})
    logged = [
        MetricsLogged(values={"metrics/recall": v, "metrics/mAP50": v}, phase="val", epoch=i)
        for i, v in enumerate((0.2, 0.5, math.nan, 0.4))
    ]
    best = log(tmp_path / "open", started, *logged)["best"]
    assert {"metric": "metrics/mAP50", "value": 0.5, "epoch": 1, "reported": False} == best
    end = RunEnded(status="finished", best=Best(metric="fitness", value=math.nan, epoch=3))
    best = log(tmp_path / "ended", started, *logged, end)["best"]
    assert {"metric": "fitness", "value": "NaN", "epoch": 3, "reported": True} == best


GOALS = {"val/*": "min", "val/head[0]/acc": "max", "val/acc*": "max"}


def test_a_goal_of_a_name_counts_more_than_that_of_a_prefix(tmp_path: Path) -> None:
    """`prefix*` is the only pattern in a goal; the exact name decides, brackets and all."""
    started = msgspec.convert({"type": "run.started", "goals": GOALS}, RunStarted)
    logged = [
        MetricsLogged(values={"val/head[0]/acc": value}, phase="val", epoch=epoch)
        for epoch, value in enumerate((0.25, 0.75, 0.5))
    ]
    best = log(tmp_path, started, *logged)["best"]
    assert ("val/head[0]/acc", 0.75, 1) == (best["metric"], best["value"], best["epoch"])


def test_curves_keep_their_shape(tmp_path: Path) -> None:
    """A curve keeps evenly picked points with both ends, its classes, and their mean."""
    x = np.linspace(0, 1, 1001)
    curve = CurveLogged(key="c", x=x, y=np.stack([x, 3 * x]), classes=["a", "b"], x_label="R")
    found = log(tmp_path, curve, curve_points=11)["curves"]["c"]
    expected = [round(i / 10, 6) for i in range(11)]
    assert (expected, ["a", "b"], "R") == (found["x"], found["classes"], found["x_label"])
    assert [2 * v for v in expected] == pytest.approx(found["mean"])
    assert [3 * v for v in expected] == pytest.approx(found["y"][1])


def test_params_are_text_with_dotted_names(tmp_path: Path) -> None:
    """Nested, long and huge values can all be read, and `params.updated` replaces its own."""
    params = {"a": {"b": [1, math.inf]}, "big": 2**70, "no": None, "batch": -1, "text": "x" * 30000}
    data = log(tmp_path, RunStarted(params=params), ParamsUpdated(params={"batch": 16}))
    shown = dict(data["params"])
    assert "x" * 20000 == shown.pop("text")
    assert {"a.b": '[1, "Infinity"]', "big": str(2**70), "no": "null", "batch": "16"} == shown


def test_pictures_are_copied_and_the_last_ones_kept(tmp_path: Path) -> None:
    """A picture's file is the page's own; of each name the last ones stay."""
    source = tmp_path / "plot.png"
    events = []
    for index in range(3):
        events.append(ImageLogged(key="plot", path=str(source), epoch=index))
    sink = sink_for(tmp_path, pictures=2)
    for index, record in enumerate(records(*events)):
        source.write_bytes(png(2 + index, 2))
        sink.write([record])
    sink.close()
    folder = tmp_path / "run"
    kept = [(item["epoch"], item["file"]) for item in data_of(folder)["pictures"]["plot"]]
    assert [(1, "pictures/1-2.png"), (2, "pictures/1-3.png")] == kept
    assert ["1-2.png", "1-3.png"] == sorted(p.name for p in (folder / "pictures").iterdir())
    assert png(4, 2) == (folder / "pictures" / "1-3.png").read_bytes()


@pytest.mark.parametrize("name", ["gone.png", "page.html", "vector.svg", "noending"])
def test_a_picture_that_browsers_can_not_show_is_counted(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that is missing, or that a browser could execute, is skipped with one log line."""
    if name != "gone.png":
        (tmp_path / name).write_text("<script>")
    sink = sink_for(tmp_path)
    sink.write(records(ImageLogged(key="plot", path=str(tmp_path / name))))
    assert 1 == sink.lost
    assert "picture 'plot' can't be shown" in caplog.text
    sink.close()
    assert {} == data_of(tmp_path / "run")["pictures"]


def test_a_failure_is_kept_with_its_traceback(tmp_path: Path) -> None:
    """What ended a run is in the page: its type, message and traceback."""
    try:
        raise ValueError("loss is <nan>")
    except ValueError as error:
        data = log(tmp_path, RunStarted(), ended_by(error))
    assert ("failed", "ValueError: loss is <nan>") == (data["status"], data["reason"])
    assert "test_html.py" in data["error"]["traceback"]


def test_hostile_text_stays_in_its_block(tmp_path: Path) -> None:
    """No text ends the block of data, and all of it is read back as it was."""
    log(
        tmp_path, RunStarted(name=HOSTILE, params={HOSTILE: HOSTILE}), TextLogged(key="t", text="é")
    )
    page = tmp_path / "run" / "index.html"
    (run,) = shown_in(page)["runs"]
    assert (HOSTILE, {HOSTILE: HOSTILE}) == (run["about"]["name"], run["params"])
    assert 3 == page.read_text(encoding="utf-8").count("</script>")


def test_the_folder_is_all_that_is_needed(tmp_path: Path) -> None:
    """The page names no address, and plotly lies beside it; no temporary file is left."""
    log(tmp_path, RunStarted())
    folder = tmp_path / "run"
    assert "http" not in (folder / "index.html").read_text(encoding="utf-8").replace("http-eq", "")
    names = sorted(path.name for path in folder.iterdir())
    assert ["data.json", "index.html", "pictures", "plotly.min.js"] == names


def test_a_malformed_curve_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A curve whose values don't match its axis is the only record lost."""
    sink = sink_for(tmp_path)
    curve = CurveLogged(key="odd", x=np.arange(3), y=np.ones((1, 2)), classes=["a"])
    sink.write(records(curve, TextLogged(key="t", text="after")))
    sink.close()
    assert 1 == sink.lost
    assert "'odd' can't be shown" in caplog.text
    assert ["after"] == [text["text"] for text in data_of(tmp_path / "run")["texts"]]


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """What could not be written is in the page as soon as there is room again."""
    sink = sink_for(tmp_path)
    (tmp_path / "run" / ".data.json.tmp").mkdir()
    with pytest.raises(OSError, match=r"data\.json\.tmp"):
        sink.write(records(RunStarted(), *epoch(0, 1.0)))
    (tmp_path / "run" / ".data.json.tmp").rmdir()
    sink.close()
    assert 1 == data_of(tmp_path / "run")["done"]


# Errors and options -------------------------------------------------------------------------------


def test_each_run_must_have_its_folder() -> None:
    """A folder without the run's id is rejected when the configuration is read."""
    text = json.dumps({"sinks": {"page": {"type": "html", "dir": "pages"}}})
    with pytest.raises(trainbus.ConfigError, match=r"sinks\.page\.dir: .*\{run\}"):
        config.loads(text)


def test_foreign_data_is_not_overwritten(tmp_path: Path) -> None:
    """An invalid data.json is an error that says what to do; the file stays."""
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "data.json"
    file.write_text('{"mine": 1}')
    with pytest.raises(SinkError, match=r"expected in .*data\.json .*; move the folder away"):
        sink_for(tmp_path)
    assert '{"mine": 1}' == file.read_text()


def test_says_what_can_not_be_written(tmp_path: Path) -> None:
    """The error names a folder that can't be created, the reason, and what to change."""
    (tmp_path / "run").write_text("")
    with pytest.raises(SinkError, match=r"can't write .*/run: .*; set another `dir`"):
        sink_for(tmp_path)


@pytest.mark.parametrize("isolation", ["inline", "process"])
def test_a_configuration_makes_a_page(tmp_path: Path, isolation: str) -> None:
    """A YAML file is all it takes."""
    file = tmp_path / "bus.yaml"
    file.write_text(
        f"sinks:\n  page:\n    type: html\n    isolation: {isolation}\n"
        f"    dir: {tmp_path}/pages/{{run}}\n"
    )
    with trainbus.load(file) as bus, bus.run(name="demo") as run:
        for _ in run.epochs(2):
            run.log({"loss": 1.0})
        run.image("picture", np.zeros((4, 4, 3)))
    (receipt,) = bus.receipts
    (report,) = receipt.sinks
    page = tmp_path / "pages" / receipt.run / "index.html"
    assert (None, str(page)) == (report.error, report.location)
    (data,) = shown_in(page)["runs"]
    assert ("finished", 2) == (data["status"], data["done"])
    assert receipt.emitted == sum(data["records"].values())
    assert (page.parent / data["pictures"]["picture"][0]["file"]).is_file()


# Comparing ----------------------------------------------------------------------------------------


def two_runs(folder: Path) -> list[Path]:
    for run, rate in (("one", 0.1), ("two", 0.2)):
        sink = sink_for(folder, run=run)
        started = RunStarted(name=run, params={"lr": rate, "batch": 16}, goals={"acc": "max"})
        final = MetricsLogged(values={"acc": rate}, phase="test", final=True)
        logged = [started, *epoch(0, rate), *epoch(1, rate / 2), final]
        sink.write(records(*logged, RunEnded(status="finished"), run=run))
        sink.close()
    return [folder / "one", folder / "two"]


def test_compare_puts_runs_into_one_page(tmp_path: Path) -> None:
    """All runs are in the page, in the order given, and it needs no other folder."""
    page = compare(two_runs(tmp_path), tmp_path / "out")
    assert tmp_path / "out" / "index.html" == page
    assert ["one", "two"] == [run["run"] for run in shown_in(page)["runs"]]
    assert (tmp_path / "out" / "plotly.min.js").stat().st_size > 1_000_000


@pytest.mark.parametrize(
    ("folders", "said"), [(["nothing"], "expected the page of a run"), ([], "found none")]
)
def test_compare_says_what_it_needs(tmp_path: Path, folders: Sequence[str], said: str) -> None:
    """A folder that is no page is named."""
    with pytest.raises(SinkError, match=said):
        compare([tmp_path / name for name in folders], tmp_path / "out")


# In the browser -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser for all tests."""
    pytest.importorskip("websockets", reason="no websockets to drive a browser with")
    if chromium() is None:
        pytest.skip("no chromium is installed")
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a made-up training with everything in it."""
    return screenshots.write_page(tmp_path_factory.mktemp("page"))


def is_quiet(browser: Browser) -> bool:
    """Return whether no script failed and only files of the folder were requested."""
    assert [] == browser.errors
    return is_local(browser)


def is_local(browser: Browser) -> bool:
    """Return whether nothing was asked of a network."""
    return all(url.startswith(("file:", "data:", "blob:", "about:")) for url in browser.requests)


def chart(name: str) -> str:
    """Return the JavaScript for the chart of a metric."""
    return f"document.querySelector('[data-base=\"{name}\"] .chart')"


def drawn(browser: Browser, name: str) -> None:
    browser.wait(f"{chart(name)}.scrollIntoView(), !!{chart(name)}._fullLayout")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_fits_wide_and_narrow_light_and_dark(
    browser: Browser, page: Path, width: int, dark: bool
) -> None:
    """The page is as wide as the window and follows the system's colours; charts do too."""
    browser.open(page, width=width, dark=dark)
    drawn(browser, "box_loss")
    assert width == browser.eval("document.documentElement.scrollWidth")
    colours = browser.eval("getComputedStyle(document.body).backgroundColor")
    assert ("rgb(17, 20, 24)" if dark else "rgb(246, 247, 249)") == colours
    ink = browser.eval(f"{chart('box_loss')}._fullLayout.font.color")
    assert ("#e8ebef" if dark else "#16191d") == ink
    assert is_quiet(browser)


def test_the_page_reads_goals_as_everything_else_does(browser: Browser, tmp_path: Path) -> None:
    """The script has a matcher of its own, which means the same: it marks the better value."""
    started = msgspec.convert({"type": "run.started", "goals": GOALS}, RunStarted)
    names = ["val/head[0]/acc", "val/head0/acc", "val/acc_top5", "val/loss", "loss"]
    logged = [
        MetricsLogged(values=dict.fromkeys(names, value), phase="val", epoch=epoch)
        for epoch, value in enumerate((1.0, 3.0, 2.0))
    ]
    log(tmp_path, started, *logged, RunEnded(status="finished"))
    browser.open(tmp_path / "run" / "index.html")
    marked = browser.eval(
        "[...document.querySelectorAll('tr:has(td.best)')].map((row) => "
        "[row.cells[0].textContent, row.querySelector('td.best').textContent[0]])"
    )
    best = {"max": "3", "min": "1"}
    goals = [(name, started.goal_of(name)) for name in names]
    assert sorted([name, best[goal]] for name, goal in goals if goal) == sorted(marked)


def test_all_is_on_the_page(browser: Browser, page: Path) -> None:
    """Each part has its section, and the top says the most important."""
    browser.open(page)
    titles = browser.eval("[...document.querySelectorAll('h2')].map((e) => e.textContent)")
    expected = (
        "Metrics|Values|Curves by class|Confusion matrix|Tables|Pictures|Parameters|Model|"
        "Checkpoints|Alerts|Text|Records"
    )
    assert expected.split("|") == titles
    tiles = browser.eval("document.querySelector('.tiles').innerText")
    for text in ("30 of 30", "worst class\ncone", "0.6213", "epoch 27"):
        assert text in tiles
    assert "finished" == browser.eval("document.getElementById('status').textContent")
    assert "cone worst" == browser.eval("document.querySelector('tr.worst td').textContent")
    picture = "document.querySelector('.pictures img')"
    browser.wait(f"{picture}.scrollIntoView(), {picture}.naturalWidth === 160")


def test_charts_have_train_and_validation_and_smoothing(browser: Browser, page: Path) -> None:
    """One chart has both phases; smoothing adds a line to each; all values are there."""
    browser.open(page)
    drawn(browser, "box_loss")
    names = browser.eval(f"{chart('box_loss')}.data.map((t) => t.name)")
    assert ["train (steps)", "train", "validation"] == names
    sizes = browser.eval(f"{chart('box_loss')}.data.map((t) => t.y.length)")
    assert [120, 30, 30] == sizes
    assert 30 == pytest.approx(browser.eval(f"{chart('box_loss')}.data[0].x[119]"))
    browser.open(page, "smooth=0.6")
    drawn(browser, "box_loss")
    assert 6 == browser.eval(f"{chart('box_loss')}.data.length")


def test_clicks_change_charts_and_the_address(browser: Browser, page: Path) -> None:
    """The log scale is switched by a click, and the address leads to the same view."""
    browser.open(page)
    drawn(browser, "cls_loss")
    browser.click("#toggle-log")
    browser.wait(f"{chart('cls_loss')}._fullLayout.yaxis.type === 'log'")
    assert "#log=1" == browser.eval("location.hash")
    browser.type("#param", "lr0")
    rows = "[...document.querySelectorAll('[data-param]')].filter((r) => !r.hidden)"
    assert ["lr0"] == browser.eval(f"{rows}.map((r) => r.dataset.param)")
    assert "#log=1&param=lr0" == browser.eval("location.hash")


def test_an_address_leads_to_a_view(browser: Browser, page: Path) -> None:
    """Axis, filter and classes are taken from the address."""
    browser.open(page, "x=step&chart=box&hide=pallet")
    shown = "[...document.querySelectorAll('.metric')].filter((c) => !c.hidden)"
    assert ["box_loss"] == browser.eval(f"{shown}.map((c) => c.dataset.base)")
    drawn(browser, "box_loss")
    assert 1200 == browser.eval(f"{chart('box_loss')}.data[1].x[29]")
    assert "step" == browser.eval(f"{chart('box_loss')}._fullLayout.xaxis.title.text")
    curve = "document.querySelector('.curve .chart')"
    browser.wait(f"{curve}.scrollIntoView(), !!{curve}._fullLayout")
    visible = browser.eval(f"{curve}.data.map((t) => t.visible)")
    assert [False, True, True, True, True, True, True] == visible
    browser.click("#classes-none")
    browser.wait(f"{curve}.data.filter((t) => t.visible).length === 1")


def test_the_matrix_shows_counts_or_shares(browser: Browser, page: Path) -> None:
    """A click turns counts into shares of each true class."""
    browser.open(page)
    matrix = "document.querySelector('[data-kind=matrix]')"
    browser.wait(f"{matrix}.scrollIntoView(), !!{matrix}._fullLayout")
    assert browser.eval(f"{matrix}.data[0].z[0][0]") > 100
    browser.click("#toggle-norm")
    browser.wait(f"{matrix}.data[0].z[0][0] <= 1")
    sums = browser.eval(f"{matrix}.data[0].z.map((row) => row.reduce((a, b) => a + b))")
    assert [1.0] * 6 == pytest.approx(sums)


def test_tables_are_sorted_by_a_click(browser: Browser, page: Path) -> None:
    """The worst class comes first; a click on a column sorts by it, a second one turns it round."""
    browser.open(page)
    cells = "[...document.querySelectorAll('.table tbody tr')].map((r) => r.cells[1].textContent)"
    for _ in range(2):
        browser.click(".table th:nth-child(2) button")
    assert ["245", "236", "227", "218", "209", "200"] == browser.eval(cells)


def test_gaps_and_odd_numbers(browser: Browser, tmp_path: Path) -> None:
    """NaN and ±Inf are gaps in a chart, and named below it and in the values."""
    values = (1.0, math.nan, 3.0, math.inf)
    log(tmp_path, RunStarted(), *(metric(value, epoch=i) for i, value in enumerate(values)))
    browser.open(tmp_path / "run" / "index.html")
    drawn(browser, "loss")
    assert [1, None, 3, None] == browser.eval(f"{chart('loss')}.data[0].y")
    text = browser.eval("document.querySelector('.metric').innerText")
    assert "train: 2 not finite (NaN at epoch 2)" in text
    assert "∞" in browser.eval("document.getElementById('values').innerText")


def test_hostile_names_are_only_shown(browser: Browser, tmp_path: Path) -> None:
    """Whatever a run calls its parts, nothing of it is run, and each is shown as it is."""
    classes = [HOSTILE, "<b>bold</b>"]
    hostile: list[Event] = [
        RunStarted(name=HOSTILE, notes=HOSTILE, tags=[HOSTILE], params={HOSTILE: HOSTILE}),
        EpochStarted(epoch=0),
        MetricsLogged(values={HOSTILE: 1.0, "__proto__": 2.0}, phase=HOSTILE, epoch=0),
        CurveLogged(
            key=HOSTILE,
            title=HOSTILE,
            x=np.arange(2),
            y=np.eye(2),
            classes=classes,
            x_label=HOSTILE,
        ),
        ConfusionMatrixLogged(key=HOSTILE, matrix=np.eye(2), classes=classes),
        TableLogged(key=HOSTILE, columns=["class", HOSTILE], rows=[[HOSTILE, HOSTILE]]),
        HistogramLogged(key=HOSTILE, counts=np.ones(2), edges=np.arange(3)),
        ImageLogged(key=HOSTILE, array=np.zeros((2, 2)), caption=HOSTILE),
        TextLogged(key=HOSTILE, text=HOSTILE),
        CheckpointSaved(path=HOSTILE, kind="best", metrics={HOSTILE: math.nan}),
        ArtifactLogged(name=HOSTILE, paths=[HOSTILE]),
        AlertRaised(title=HOSTILE, text=HOSTILE, level="error"),
        RunEnded(status="failed", reason=HOSTILE, error=ended_by(ValueError(HOSTILE)).error),
    ]
    log(tmp_path, *hostile)
    browser.open(tmp_path / "run" / "index.html")
    for index in range(browser.eval("document.querySelectorAll('.chart').length")):
        one = f"document.querySelectorAll('.chart')[{index}]"
        browser.wait(f"{one}.scrollIntoView(), !!{one}._fullLayout")
    assert "run" != browser.eval("document.title")
    assert 3 == browser.eval("document.scripts.length")
    assert 0 == browser.eval("document.querySelectorAll('[onerror], h1 *, b b').length")
    ticks = browser.eval("[...document.querySelectorAll('.ytick')].map((t) => t.textContent)")
    assert "<b>bold</b>" in ticks
    seen = HOSTILE.replace("\x1b", "\\u001b")
    assert seen == browser.eval("document.querySelector('h1').textContent")
    assert is_quiet(browser)


def test_the_browser_refuses_what_is_not_the_pages(browser: Browser, page: Path) -> None:
    """Even a script that got in would not run, and could ask nothing of a network."""
    browser.open(page)
    browser.eval(
        "{const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        "document.body.append(s); fetch('http://127.0.0.1:9/').catch(() => window.refused = 1)}"
    )
    browser.wait("window.refused === 1")
    assert browser.eval("window.ran === undefined")
    assert is_local(browser)


def test_names_of_the_language_are_names(browser: Browser, tmp_path: Path) -> None:
    """A metric or parameter may be called as what JavaScript gives every object."""
    for run, params in (("one", {"constructor": 1}), ("two", {"toString": 2})):
        sink = sink_for(tmp_path, run=run)
        values = MetricsLogged(values={"valueOf": 1.0}, phase="validation", epoch=0)
        sink.write(records(RunStarted(params=params), values, run=run))
        sink.close()
    browser.open(tmp_path / "one" / "index.html")
    assert "function" not in browser.eval("document.getElementById('page').innerText")
    browser.open(compare([tmp_path / "one", tmp_path / "two"], tmp_path / "out"))
    rows = "[...document.querySelectorAll('[data-param]')]"
    assert [["constructor", "1", "–"], ["toString", "–", "2"]] == browser.eval(
        f"{rows}.map((r) => [...r.cells].map((c) => c.textContent))"
    )
    assert is_quiet(browser)


def test_a_failure_stands_on_top(browser: Browser, tmp_path: Path) -> None:
    """A failed run shows its traceback without a click."""
    try:
        raise ValueError("out of luck")
    except ValueError as error:
        log(tmp_path, RunStarted(), ended_by(error))
    browser.open(tmp_path / "run" / "index.html")
    shown = browser.eval("document.getElementById('failure').innerText")
    assert "ValueError: out of luck" in shown.splitlines()[0]
    assert "Traceback (most recent call last)" in shown


def test_an_open_page_shows_what_comes(browser: Browser, tmp_path: Path) -> None:
    """While the run is open the page reloads by itself, and stops when it has ended."""
    sink = sink_for(tmp_path)
    sink.write(records(RunStarted(name="live"), EpochStarted(epoch=0)))
    browser.open(tmp_path / "run" / "index.html", "log=1")
    assert "running" == browser.eval("document.getElementById('status').textContent")
    whole = records(RunStarted(name="live"), *epoch(0, 1.0), RunEnded(status="stopped"))
    sink.write(whole)
    sink.close()
    status = "document.getElementById('status')"
    browser.wait(f"!!{status} && {status}.textContent === 'stopped'")
    assert "#log=1" == browser.eval("location.hash")


def test_comparing_overlays_runs(browser: Browser, tmp_path: Path) -> None:
    """Runs share charts; parameters that differ and final metrics are side by side."""
    page = compare(two_runs(tmp_path), tmp_path / "out")
    browser.open(page)
    drawn(browser, "loss")
    names = browser.eval(f"{chart('loss')}.data.map((t) => t.name)")
    assert 4 == len(names)
    assert ["one", "two"] == sorted({name.split(" · ")[0] for name in names})
    rows = "[...document.querySelectorAll('[data-param]')].filter((r) => !r.hidden)"
    assert [["lr", "0.1", "0.2"]] == browser.eval(
        f"{rows}.map((r) => [...r.cells].map((c) => c.textContent))"
    )
    browser.click("#toggle-all")
    browser.wait(f"{rows}.length === 2")
    assert ["0.2"] == browser.eval(
        "[...document.querySelectorAll('#runs td.best')].map((c) => c.textContent)"
    )
    assert is_quiet(browser)


def test_a_thinned_chart_shows_its_extremes(browser: Browser, tmp_path: Path) -> None:
    """A peak that was dropped is drawn nevertheless, and the page says that values are missing."""
    spikes = {333: 50.0, 777: -50.0}
    log(tmp_path, *(metric(spikes.get(i, 1.0), step=i) for i in range(1000)), points=10)
    browser.open(tmp_path / "run" / "index.html")
    drawn(browser, "loss")
    shown = browser.eval(f"(({{x, y}}) => x.map((v, i) => [v, y[i]]))({chart('loss')}.data[0])")
    assert [[333, 50.0], [777, -50.0]] == [point for point in shown if abs(point[1]) > 1]
    assert sorted(shown) == shown
    text = browser.eval("document.querySelector('.card.metric').innerText")
    assert "one of 128 values is drawn, and the lowest and the highest" in text
