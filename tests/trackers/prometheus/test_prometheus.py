"""The `prometheus` sink: scraped, read from its file, and received as a Pushgateway does."""

from __future__ import annotations

import ast
import errno
import json
import math
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from trainbus.sinks.prometheus import PrometheusOptions, PrometheusSink

from trainbus import ConfigError, SinkError, config
from trainbus.delivery.retry import classify
from trainbus.events import (
    AlertRaised,
    Best,
    CheckpointSaved,
    EpochEnded,
    EpochStarted,
    Event,
    MetricsLogged,
    ModelDescribed,
    Record,
    RunEnded,
    RunStarted,
)
from trainbus.interfaces import RunInfo
from trainbus.testing import SinkConformance, sample_records

PROMTOOL = shutil.which("promtool")
START = RunStarted(name='µ\n"x\\', project="p", framework="f", framework_version="1")


class TestConformance(SinkConformance):
    package = "prometheus_client"
    extra = "prometheus"
    stores = (MetricsLogged, ModelDescribed, EpochStarted, EpochEnded, CheckpointSaved, AlertRaised)

    def make(self, folder: Path) -> PrometheusSink:
        return PrometheusSink(PrometheusOptions(textfile=str(folder / "{run}.prom")))

    def read(self, folder: Path) -> object:
        return {path.name: series(path.read_text("utf-8")) for path in sorted(folder.iterdir())}


def series(text: str) -> dict[str, float]:
    """Return name{labels} → value, as Prometheus's own parser reads it."""
    found: dict[str, float] = {}
    for family in parse(text):
        for sample in family.samples:
            labels = {k: v for k, v in sorted(sample.labels.items()) if k != "run"}
            key = sample.name.removeprefix("trainbus_") + (str(labels) if labels else "")
            assert key not in found, "a series must be there once"
            found[key] = sample.value
    return found


def metric(name: str, phase: str = "train") -> str:
    return f"metric{ {'metric': name, 'phase': phase} }"


def records(*events: Event, attempt: int = 1, begin: float = 1000.0) -> list[Record]:
    return [
        Record(seq=seq, run="r", time=begin + seq, event=event, attempt=attempt)
        for seq, event in enumerate(events, 1)
    ]


def opened(run: str = "r", attempt: int = 1, **options: Any) -> PrometheusSink:
    sink = PrometheusSink(PrometheusOptions(**options))
    sink.open(RunInfo(id=run, started=START, attempt=attempt))
    return sink


def scrape(sink: PrometheusSink, accept: str = "text/plain") -> str:
    assert sink.location is not None
    request = urllib.request.Request(sink.location, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text: str = answer.read().decode()
        return text


def wait_for(condition: Any) -> Any:
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited for 60 s"
        time.sleep(0.01)
    return found


def logged(name: str, value: float, **more: Any) -> MetricsLogged:
    return MetricsLogged(values={name: value}, **{"phase": "train", **more})


def test_a_scrape_shows_the_state_of_the_run() -> None:
    """Every value is there over HTTP, once, with what it is worth, NaN and infinities included."""
    sink = opened(port=0)
    nasty = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, 'métrique/µ\n"': 5e-324}
    sink.write(
        records(
            START,
            ModelDescribed(parameters=7, speed_ms={"inference": 1.5}, extra={"x": 2}),
            EpochStarted(epoch=3),
            logged("loss", 2.5, epoch=3, step=40),
            logged("loss", 1.5, epoch=3),
            MetricsLogged(values=nasty, phase="validation", epoch=3),
            EpochEnded(epoch=3, duration_s=0.5, outcome="completed"),
            CheckpointSaved(path="gone", kind="best"),
            AlertRaised(title="t", level="error"),
            logged("loss", 9.0, final=True),
        )
    )
    found = series(scrape(sink))
    lag = found.pop("sink_lag_seconds")
    info = next(key for key in found if key.startswith("run_info"))
    assert {
        "attempt": "1",
        "framework": "f",
        "framework_version": "1",
        "group": "",
        "job_type": "",
        "name": START.name,
        "project": "p",
        "task": "",
    } == ast.literal_eval(info.removeprefix("run_info"))
    assert 1 == found.pop(info)
    assert math.isnan(found.pop(metric("nan", "validation")))
    counts = {k: found.pop(k) for k in list(found) if k.startswith("records_total")}
    assert 10 == sum(counts.values())
    assert 4 == counts["records_total{'event': 'metrics.logged'}"]
    assert {
        metric("loss"): 1.5,
        metric("final/loss"): 9.0,
        metric("inf", "validation"): math.inf,
        metric("-inf", "validation"): -math.inf,
        metric('métrique/µ\n"', "validation"): 5e-324,
        "model{'property': 'parameters'}": 7,
        "model{'property': 'speed_inference(ms)'}": 1.5,
        "model{'property': 'x'}": 2,
        "epoch": 4,
        "epoch_duration_seconds": 0.5,
        "step": 40,
        "run_status{'status': 'running'}": 1,
        "run_status{'status': 'finished'}": 0,
        "run_status{'status': 'failed'}": 0,
        "run_status{'status': 'stopped'}": 0,
        "alerts_total{'level': 'error'}": 1,
        "last_checkpoint_timestamp_seconds{'kind': 'best'}": 1008.0,
        "last_record_timestamp_seconds": 1010.0,
    } == found
    assert time.time() - 1010 == pytest.approx(lag, abs=10)
    sink.close()


@pytest.mark.parametrize("status", ["finished", "failed", "stopped"])
def test_the_end_shows_until_close(status: Any) -> None:
    """The status and the last values stay when the run is over; after close nothing listens."""
    sink = opened(port=0)
    best = Best(metric="loss", value=0.25)
    sink.write(records(START, logged("loss", 1.5), RunEnded(status=status, best=best)))
    sink.flush()
    found = series(scrape(sink))
    states = [k for k, v in found.items() if k.startswith("run_status") and v]
    assert [f"run_status{ {'status': status} }"] == states
    assert (1.5, 0.25) == (found[metric("loss")], found["best{'metric': 'loss'}"])
    sink.close()
    with pytest.raises(OSError, match="refused"):
        scrape(sink)


def test_openmetrics_is_valid_too(tmp_path: Path) -> None:
    """What a Prometheus server asks for by default passes the strict parser."""
    sink = opened(port=0)
    sink.write(sample_records(tmp_path))
    text = scrape(sink, "application/openmetrics-text;version=1.0.0")
    assert text.endswith("# EOF\n")
    parse_strictly: Any = openmetrics.text_string_to_metric_families
    names = {family.name for family in parse_strictly(text)}
    assert {"trainbus_metric", "trainbus_records", "trainbus_run_info"} <= names
    sink.close()


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_promtool_finds_no_fault(tmp_path: Path) -> None:
    """Prometheus's own checker takes what is scraped and what is in the file, without a remark."""
    assert PROMTOOL is not None
    sink = opened(port=0, textfile=str(tmp_path / "t.prom"))
    sink.write(sample_records(tmp_path))
    sink.flush()
    assert sink.location is not None
    with urllib.request.urlopen(sink.location.split(",")[0], timeout=60) as answer:
        scraped = answer.read()
    for text in (scraped, (tmp_path / "t.prom").read_bytes()):
        done = subprocess.run(
            [PROMTOOL, "check", "metrics"], input=text, capture_output=True, timeout=60, check=False
        )
        assert (0, b"", b"") == (done.returncode, done.stdout, done.stderr)
    sink.close()


def test_a_real_prometheus_scrapes_it(tmp_path: Path) -> None:
    """A Prometheus server finds the target up, and answers queries with its values."""
    server = shutil.which("prometheus")
    if server is None:
        pytest.skip("prometheus is not installed")
    sink = opened(port=0)
    sink.write(records(START, logged("loss", 1.5)))
    assert sink.location is not None
    target = sink.location.split("/")[2]
    jobs = [{"job_name": "t", "static_configs": [{"targets": [target]}]}]
    file = {"global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"}}
    (tmp_path / "p.yml").write_text(json.dumps({**file, "scrape_configs": jobs}))
    port = free_port()
    process = subprocess.Popen(
        [
            server,
            f"--config.file={tmp_path / 'p.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answer() -> Any:
        query = f"http://127.0.0.1:{port}/api/v1/query?query=trainbus_metric"
        try:
            with urllib.request.urlopen(query, timeout=60) as found:
                return json.load(found)["data"]["result"]
        except OSError:  # not up yet
            return []

    try:
        (found,) = wait_for(answer)
    finally:
        process.terminate()
        process.wait(10)
        sink.close()
    assert ("r", "loss", "train") == tuple(found["metric"][k] for k in ("run", "metric", "phase"))
    assert "1.5" == found["value"][1]


def test_runs_of_one_process_do_not_mix() -> None:
    """Two open sinks have their own ports and values, and the global registry has none of them."""
    before = {family.name for family in REGISTRY.collect()}
    first, second = opened("one", port=0), opened("two", port=0)
    first.write(records(START, logged("loss", 1.0)))
    second.write(records(START, logged("loss", 2.0)))
    for sink, run, value in ((first, "one", 1.0), (second, "two", 2.0)):
        found = [sample for family in parse(scrape(sink)) for sample in family.samples]
        assert {run} == {sample.labels["run"] for sample in found}
        assert [value] == [s.value for s in found if s.name == "trainbus_metric"]
        sink.close()
    assert before == {family.name for family in REGISTRY.collect()}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def test_a_port_in_use_is_an_error() -> None:
    """The error says what to set; it may go well later, but nobody waits for it at the end."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SinkError, match=rf"port {port} of 127\.0\.0\.1 is in use.*`port`") as e:
            opened(port=port)
        assert "later" == classify(e.value)
        sink = opened(port=port, next_ports=50)
        assert sink.location != f"http://127.0.0.1:{port}/metrics"
        assert {"run_status"} <= {key.split("{")[0] for key in series(scrape(sink))}
        sink.close()
    again = opened(port=port)
    assert f"http://127.0.0.1:{port}/metrics" == again.location
    again.close()


def test_an_address_of_another_machine_is_an_error() -> None:
    """An address of no network of this machine is named, with what to set."""
    with pytest.raises(SinkError, match=r"can't listen on port 0 of 192\.0\.2\.1 .*`address`"):
        opened(port=0, address="192.0.2.1")


def test_close_waits_for_a_last_scrape() -> None:
    """With `linger_secs`, the end is scraped once before the port is closed."""
    sink = opened(port=0, linger_secs=60)
    sink.write(records(START, RunEnded(status="failed")))
    closing = threading.Thread(target=sink.close)
    closing.start()
    assert 1 == series(scrape(sink))["run_status{'status': 'failed'}"]
    closing.join(10)
    assert not closing.is_alive()


def test_the_file_can_be_read_by_another_user(tmp_path: Path) -> None:
    """The file is whole, has nothing beside it, and is not the owner's alone."""
    sink = opened(textfile=str(tmp_path / "new" / "{run}.prom"))
    sink.write(records(START, logged("loss", 1.5)))
    path = tmp_path / "new" / "r.prom"
    assert str(path) == sink.location
    assert 0o044 == path.stat().st_mode & 0o044
    found = series(path.read_text("utf-8"))
    assert 1.5 == found[metric("loss")]
    assert "sink_lag_seconds" not in found
    sink.close()
    assert [path] == list(path.parent.iterdir())


def test_what_comes_soon_after_is_written_later(tmp_path: Path) -> None:
    """Values that follow too soon are in the file when the interval is over, without a record."""
    path = tmp_path / "t.prom"
    sink = opened(textfile=str(path), interval_secs=0.3)
    first, second = records(logged("loss", 1.0), logged("loss", 2.0))
    sink.write([first])
    assert 1.0 == series(path.read_text("utf-8"))[metric("loss")]
    sink.write([second])
    wait_for(lambda: 2.0 == series(path.read_text("utf-8"))[metric("loss")])
    sink.close()


def test_after_a_kill_everything_is_there_once(tmp_path: Path) -> None:
    """A new sink to which the attempt comes again counts nothing twice."""
    path = tmp_path / "t.prom"
    all_of_them = records(START, logged("loss", 1.0), AlertRaised(title="t", level="info"))
    opened(textfile=str(path)).write(all_of_them)  # and is never closed
    sink = PrometheusSink(PrometheusOptions(textfile=str(path)))
    sink.open(RunInfo(id="r", started=START, reopened=True))
    sink.write(all_of_them)
    sink.close()
    found = series(path.read_text("utf-8"))
    assert 1 == found["alerts_total{'level': 'info'}"]
    assert 1.0 == found[metric("loss")]


def test_a_resumed_run_keeps_its_metrics(tmp_path: Path) -> None:
    """The second attempt continues the file of the first; another run does not."""
    path = tmp_path / "t.prom"
    sink = opened(textfile=str(path))
    sink.write(records(START, logged("old", 1.0), logged("both", 1.0)))
    sink.close()
    sink = opened(attempt=2, textfile=str(path))
    sink.write(records(START, logged("both", 2.0), attempt=2))
    sink.close()
    found = series(path.read_text("utf-8"))
    assert (1.0, 2.0) == (found[metric("old")], found[metric("both")])
    other = opened("other", textfile=str(path))
    other.write(records(START))
    other.close()
    assert metric("old") not in series(path.read_text("utf-8"))


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    """What is no exposition, or no text, keeps nobody from writing one."""
    path = tmp_path / "t.prom"
    for damage in (b"trainbus_metric{run=", b"\xff\xfe", b'trainbus_metric{run="r"} 1\n'):
        path.write_bytes(damage)
        sink = opened(textfile=str(path))
        sink.write(records(START, logged("loss", 1.0)))
        sink.close()
        assert 1.0 == series(path.read_text("utf-8"))[metric("loss")]


def test_metrics_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """Beyond `max_metrics` known series continue; new ones are dropped, counted and logged once."""
    sink = opened(port=0, max_metrics=2)
    for at, value in enumerate((1.0, 2.0), 1):
        values = {f"m{n}": value for n in range(5)}
        event = MetricsLogged(values=values, phase="train")
        sink.write([Record(seq=at, run="r", time=0.0, event=event)])
    found = series(scrape(sink))
    assert [2.0, 2.0] == [v for k, v in found.items() if k.startswith("metric")]
    assert 2 == sink.lost
    assert ["dropping the metrics after the first 2; set `max_metrics`"] == [
        r.getMessage() for r in caplog.records
    ]
    sink.close()


def test_long_names_stay_apart() -> None:
    """Names are cut, never so that two become one; what is no UTF-8 is spelled out."""
    sink = opened(port=0)
    values = {"x" * 300 + "a": 1.0, "x" * 300 + "b": 2.0, "half \ud800": 3.0}
    sink.write(records(MetricsLogged(values=values, phase="train")))
    found = [s for f in parse(scrape(sink)) for s in f.samples if s.name == "trainbus_metric"]
    assert {1.0, 2.0, 3.0} == {sample.value for sample in found}
    assert all(len(sample.labels["metric"]) <= 200 for sample in found)
    sink.close()


class Gateway(ThreadingHTTPServer):
    """Receives as a Pushgateway does: a group's path → its last body."""

    def __init__(self, port: int = 0) -> None:
        self.groups: dict[str, str] = {}
        self.status = 200
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                if gateway.status == 200:
                    gateway.groups[self.path] = body
                self.send_response(gateway.status)
                self.end_headers()

            def do_DELETE(self) -> None:
                gateway.groups.pop(self.path)
                self.send_response(202)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    one = Gateway()
    yield one
    one.stop()


def test_a_pushgateway_gets_the_group_of_the_run(gateway: Gateway) -> None:
    """Values are pushed under job and run, and no port is opened besides."""
    sink = opened(pushgateway=gateway.url + "/")
    sink.write(records(START, logged("loss", 1.5)))
    sink.close()
    assert ["/metrics/job/trainbus/run/r"] == list(gateway.groups)
    assert 1.5 == series(gateway.groups["/metrics/job/trainbus/run/r"])[metric("loss")]
    assert f"{gateway.url}/metrics/job/trainbus" == sink.location


def test_nothing_is_left_where_that_is_asked_for(tmp_path: Path, gateway: Gateway) -> None:
    """Without `keep`, file and group go when the run is over."""
    path = tmp_path / "t.prom"
    sink = opened(pushgateway=gateway.url, textfile=str(path), keep=False)
    sink.write(records(START))
    assert path.exists()
    assert 1 == len(gateway.groups)
    sink.close()
    assert not path.exists()
    assert {} == gateway.groups


def test_a_pushgateway_that_is_down_gets_it_later() -> None:
    """A push that fails is tried again, and then has everything."""
    port = free_port()
    sink = opened(pushgateway=f"http://127.0.0.1:{port}")
    batch = records(START, logged("loss", 1.5))
    with pytest.raises(SinkError, match=rf"Pushgateway at http://127\.0\.0\.1:{port} failed") as e:
        sink.write(batch)
    assert "retry" == classify(e.value)
    gateway = Gateway(port)
    sink.write(batch)
    assert 1.5 == series(gateway.groups["/metrics/job/trainbus/run/r"])[metric("loss")]
    sink.close()
    gateway.stop()


@pytest.mark.parametrize(
    ("status", "verdict"), [(400, "rejected"), (401, "stop"), (429, "retry"), (503, "retry")]
)
def test_what_a_pushgateway_answers_counts(gateway: Gateway, status: int, verdict: str) -> None:
    """Only what may pass is tried again."""
    gateway.status = status
    sink = opened(pushgateway=gateway.url)
    with pytest.raises(SinkError, match=str(status)) as e:
        sink.write(records(START))
    assert verdict == classify(e.value)
    gateway.status = 200
    sink.close()


def test_a_file_that_can_not_be_written_is_an_error(tmp_path: Path) -> None:
    """The path is named, with the reason and what to set."""
    (tmp_path / "file").write_text("")
    sink = opened(textfile=str(tmp_path / "file" / "t.prom"))
    with pytest.raises(SinkError, match=r"can't write .*/t\.prom: .*; set another `textfile`") as e:
        sink.write(records(START))
    assert isinstance(e.value.__cause__, OSError)
    assert e.value.__cause__.errno in (errno.ENOTDIR, errno.EEXIST)
    (tmp_path / "file").unlink()
    sink.close()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("textfile: metrics.txt", r"yaml:5: sinks\.p\.textfile: .*ends in \.prom"),
        ("pushgateway: 'http://me:secret@host'", r"yaml:5: sinks\.p\.pushgateway: .*login"),
        ("pushgateway: host:9091", r"yaml:5: sinks\.p\.pushgateway: .*http://"),
        ("port: 70000", r"yaml:5: sinks\.p\.port: .*65535"),
        ("interval_secs: 0", r"yaml:5: sinks\.p\.interval_secs"),
        ("prot: 1", r"sinks\.p.*'port'"),
    ],
)
def test_options_are_checked(options: str, expected: str) -> None:
    """Each fault is reported with its line and what was expected."""
    text = f"\nsinks:\n  p:\n    type: prometheus\n    {options}\n"
    with pytest.raises(ConfigError, match=expected):
        config.loads(text, name="bus.yaml")


@pytest.mark.parametrize("isolation", ["inline", "process"])
def test_a_bus_fills_the_file(tmp_path: Path, isolation: str) -> None:
    """A configured bus leaves the last values in the file, whoever runs the sink."""
    path = str(tmp_path / "t.prom")
    sink = {"type": "prometheus", "textfile": path, "isolation": isolation}
    with config.loads(json.dumps({"sinks": {"p": sink}})) as bus, bus.run(name="n") as run:
        run.log({"loss": 1.5}, step=3)
    found = series(Path(path).read_text("utf-8"))
    assert 1 == found["run_status{'status': 'finished'}"]
    assert 3 == found["step"]
    assert [1.5] == [v for k, v in found.items() if k.startswith("metric")]
