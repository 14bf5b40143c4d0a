"""The `notify` sink: what a real HTTP server gets from it, by Apprise's `json://`."""

from __future__ import annotations

import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from trainbus.sinks.notify import NotifyOptions, NotifySink

from trainbus import ConfigError, SinkError, config
from trainbus.delivery.retry import classify
from trainbus.events import (
    AlertRaised,
    Best,
    Event,
    Failure,
    MetricsLogged,
    Record,
    RunEnded,
    RunStarted,
)
from trainbus.interfaces import RunInfo
from trainbus.testing import SinkConformance

# Apprise's mail plugin imports it, once a process.
pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")

SECRET = "tok-9f8e7d6c5b4a"
ALL = ["start", "end", "failure", "alert", "best"]
FOREVER = 1e12


class Server(ThreadingHTTPServer):
    """Keeps the messages that it gets, by the path that they are sent to."""

    def __init__(self, port: int = 0) -> None:
        self.got: dict[str, list[dict[str, str]]] = defaultdict(list)
        self.status: dict[str, int] = defaultdict(lambda: 200)
        self.requests = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.requests += 1
                message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status = server.status[self.path]
                if status == 200:
                    server.got[self.path].append({k: message[k] for k in KEPT})
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        super().__init__(("127.0.0.1", port), Handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def url(self, path: str = f"/{SECRET}") -> str:
        return f"json://127.0.0.1:{self.server_port}{path}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


KEPT = ("title", "message", "type")


class TestConformance(SinkConformance):
    package = "apprise"
    extra = "notify"
    heavy = ("requests",)
    stores = (AlertRaised, RunEnded)
    secrets = (SECRET,)
    server: ClassVar[Server]

    def make(self, folder: Path) -> NotifySink:
        options = NotifyOptions(
            urls=[self.server.url(f"/{SECRET}{folder}")],
            when=ALL,
            min_interval_secs=0,
            max_age_secs=FOREVER,
            state=str(folder / "state"),
        )
        return NotifySink(options)

    def read(self, folder: Path) -> object:
        return self.server.got[f"/{SECRET}{folder}"]


@pytest.fixture(autouse=True, scope="module")
def _conformance() -> Iterator[None]:
    TestConformance.server = Server()
    yield
    TestConformance.server.stop()


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.stop()


@pytest.fixture
def sinks(tmp_path: Path, server: Server) -> Any:
    """Return a function that opens a sink of the run `r`."""

    def opened(*, started: RunStarted = START, run: str = "r", **options: Any) -> NotifySink:
        given = {"urls": [server.url()], "state": str(tmp_path / "state"), "when": ALL, **options}
        sink = NotifySink(NotifyOptions(**given))
        sink.open(RunInfo(id=run, started=started))
        return sink

    return opened


START = RunStarted(name="shapes", project="p", framework="f", goals={"acc*": "max"})


def records(*events: Event, every_s: float = 100.0, age_s: float = 0.0) -> list[Record]:
    begin = time.time() - age_s
    return [
        Record(seq=seq, run="r", time=begin + every_s * seq, event=event)
        for seq, event in enumerate(events, 1)
    ]


def logged(name: str, value: float, **more: Any) -> MetricsLogged:
    return MetricsLogged(values={name: value}, **{"phase": "validation", **more})


def alert(title: str, **more: Any) -> AlertRaised:
    return AlertRaised(title=title, **{"level": "warning", **more})


def got(server: Server, path: str = f"/{SECRET}") -> list[dict[str, str]]:
    return server.got[path]


def titles(server: Server, path: str = f"/{SECRET}") -> list[str]:
    return [message["title"] for message in got(server, path)]


def test_what_arrives_of_a_run(server: Server, sinks: Any) -> None:
    """Start, best values, alerts and the end arrive with what a person wants to know."""
    sink = sinks()
    sink.write(
        records(
            START,
            logged("acc", 0.5, epoch=0),
            logged("acc", 0.25, epoch=1),
            logged("acc", 0.75, epoch=2),
            logged("loss", 1.23456789, epoch=2),
            logged("gpu", 99.0, phase="system"),
            alert("Overheated", text="GPU 0\nat 99 °C", level="error"),
            RunEnded(status="finished", reason="early stopping", best=None),
        )
    )
    assert [
        {"title": "shapes: started", "message": "framework: f\nrun: r", "type": "info"},
        {
            "title": "shapes: new best acc 0.75",
            "message": "acc: 0.75 in epoch 3, was 0.5\nrun: r",
            "type": "success",
        },
        {
            "title": "shapes: Overheated",
            "message": "GPU 0\nat 99 °C\nrun: r",
            "type": "failure",
        },
        {
            "title": "shapes: finished",
            "message": "reason: early stopping\nbest: acc 0.75 in epoch 3\n"
            "duration: 0 h 11 min 40 s\nlast: acc 0.75, loss 1.2346\nrun: r",
            "type": "success",
        },
    ] == got(server)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("no memory", "ValueError: no memory"),
        ("", "ValueError"),
        (
            'Caught in worker 0.\nTraceback (most recent call last):\n  File "x.py"\nKeyError: 1',
            "ValueError: Caught in worker 0.\nKeyError: 1",
        ),
        ("x" * 5000, "ValueError: " + "x" * 481 + "…"),
    ],
)
def test_a_failure_says_why(server: Server, sinks: Any, message: str, expected: str) -> None:
    """The error's type and message arrive once, of a traceback the last line."""
    error = Failure(type="ValueError", message=message, traceback="SECRET LINES")
    reason = f"ValueError: {message}"
    sinks().write(records(RunEnded(status="failed", reason=reason, error=error)))
    (found,) = got(server)
    assert ("shapes: failed", "failure") == (found["title"], found["type"])
    assert f"error: {expected}\nrun: r" == found["message"]


def test_a_stopped_run_is_an_end(server: Server, sinks: Any) -> None:
    """Ctrl-C sends a message as an end, and none if only failures are wanted."""
    error = Failure(type="KeyboardInterrupt", message="")
    ended = RunEnded(status="stopped", reason="KeyboardInterrupt", error=error)
    sinks(when=["failure"]).write(records(ended))
    assert [] == got(server)
    sinks(when=["end"]).write(records(ended))
    message = "error: KeyboardInterrupt\nrun: r"
    assert [{"title": "shapes: stopped", "message": message, "type": "warning"}] == got(server)


def test_only_wanted_messages_are_sent(server: Server, sinks: Any) -> None:
    """By default starts and best values send no message."""
    sink = sinks(when=NotifyOptions(urls=["x"]).when)
    events = (START, logged("acc", 0.1), logged("acc", 0.2), alert("a"), RunEnded(status="failed"))
    sink.write(records(*events))
    assert ["shapes: a", "shapes: failed"] == titles(server)


def test_a_flood_is_held_back_and_counted(server: Server, sinks: Any) -> None:
    """Alerts too soon after another are skipped; the next message counts them; the end is sent."""
    sink = sinks(min_interval_secs=60)
    sink.write(records(*[alert(f"a{n}") for n in range(10)], every_s=10))
    assert ["shapes: a0", "shapes: a6"] == titles(server)
    assert got(server)[1]["message"].endswith("\nskipped since the last message: 5 × alert")
    more = records(*[alert("x")] * 10, alert("b"), RunEnded(status="finished"), every_s=10)[10:]
    sink.write(more)
    assert ["shapes: a0", "shapes: a6", "shapes: finished"] == titles(server)
    assert got(server)[2]["message"].endswith("\nskipped since the last message: 4 × alert")


def test_which_way_is_better(server: Server, sinks: Any) -> None:
    """`metric` and `goal` decide; without a goal nothing is sent; NaN is never the best."""
    sink = sinks(metric="loss", goal="min", when=["best"])
    values = (2.0, float("nan"), 3.0, 1.0, 1.0, -float("inf"))
    sink.write(records(*[logged("loss", value) for value in values]))
    assert ["shapes: new best loss 1", "shapes: new best loss -inf"] == titles(server)


def test_a_goal_of_a_name_counts_more_than_that_of_a_prefix(server: Server, sinks: Any) -> None:
    """`prefix*` is the only pattern in a goal; the exact name decides, brackets and all."""
    started = RunStarted(name="shapes", goals={"val/*": "min", "val/head[0]/acc": "max"})
    sink = sinks(started=started, when=["best"])
    sink.write(records(*[logged("val/head[0]/acc", value) for value in (0.25, 0.75, 0.5)]))
    assert ["shapes: new best val/head[0]/acc 0.75"] == titles(server)


def test_a_metric_without_a_goal_is_reported(sinks: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Where nobody knows which value is better, one line says what to set."""
    sinks(metric="loss")
    assert ["no metric has a goal, so best values are not sent; set `metric`, `goal`"] == [
        record.getMessage() for record in caplog.records
    ]


def test_title_and_body_are_templates(server: Server, sinks: Any) -> None:
    """Each field is filled in once: braces in a name stay what they are."""
    sink = sinks(
        started=RunStarted(name="{run}{x}", project="p"), title="[{kind}] {name}", body="{project}!"
    )
    sink.write(records(alert("a")))
    assert [{"title": "[alert] {run}{x}", "message": "p!", "type": "warning"}] == got(server)


def test_nothing_of_a_terminal_goes_out(server: Server, sinks: Any) -> None:
    """Control characters and half characters are replaced, line feeds in titles too."""
    sinks().write(records(alert("a\x1b[31m\nb", text="x\x00\ud800")))
    (found,) = got(server)
    assert ("shapes: a [31m b", "x  \nrun: r") == (found["title"], found["message"])


def test_old_records_are_not_announced(server: Server, sinks: Any) -> None:
    """A replay of records from two hours ago sends nothing; new records do."""
    sink = sinks()
    sink.write(records(START, alert("old"), every_s=1, age_s=7200))
    assert [] == got(server)
    sink.write(records(START, alert("old"), RunEnded(status="failed"), every_s=1)[2:])
    assert ["shapes: failed"] == titles(server)


def test_after_a_kill_each_message_is_sent_once(server: Server, sinks: Any) -> None:
    """Records that come again to a new sink send nothing, but still count for later messages."""
    batch = records(START, logged("acc", 0.5), logged("acc", 0.75), RunEnded(status="finished"))
    sinks().write(batch[:3])  # and is never closed
    sinks().write(batch)
    assert ["shapes: started", "shapes: new best acc 0.75", "shapes: finished"] == titles(server)
    assert "best: acc 0.75\nduration: 0 h 05 min 00 s" in got(server)[2]["message"]


def test_sinks_of_one_run_do_not_silence_each_other(server: Server, sinks: Any) -> None:
    """Two sinks with other services or other wishes each tell what they are asked to."""
    batch = records(START, alert("a"))
    sinks(when=["alert"]).write(batch)
    sinks(when=["start", "alert"]).write(batch)
    sinks(urls=[server.url("/other")]).write(batch)
    assert ["shapes: a", "shapes: started", "shapes: a"] == titles(server)
    assert ["shapes: started", "shapes: a"] == titles(server, "/other")


def test_a_server_that_is_down_gets_it_later(tmp_path: Path) -> None:
    """While nobody answers the sink asks to be called again, and then each message comes once."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    options = NotifyOptions(
        urls=[f"json://127.0.0.1:{port}/{SECRET}"], state=str(tmp_path), max_age_secs=0.2
    )
    sink = NotifySink(options)
    sink.open(RunInfo(id="r", started=START))
    batch = records(alert("a"), RunEnded(status="failed"), every_s=0)
    for _ in range(2):
        with pytest.raises(SinkError, match="did not reach 1 of 1 services: JSON") as e:
            sink.write(batch)
        assert "retry" == classify(e.value)
        assert SECRET not in str(e.value)
    server = Server(port)
    while time.time() - batch[0].time <= 0.2:  # too old for news, but it was tried in time
        time.sleep(0.01)
    sink.write(batch)
    sink.write(batch)
    assert "shapes: a" == titles(server)[0]
    assert 1 == titles(server).count("shapes: a")
    server.stop()


def test_one_service_that_fails_costs_the_others_nothing(server: Server, sinks: Any) -> None:
    """Who has the message does not get it again while it is tried elsewhere."""
    sink = sinks(urls=[server.url("/bad"), server.url("/good")])
    server.status["/bad"] = 503
    batch = records(alert("a"))
    for _ in range(3):
        with pytest.raises(SinkError, match="1 of 2 services: JSON") as e:
            sink.write(batch)
        assert "retry" == classify(e.value)
    server.status["/bad"] = 200
    sink.write(batch)
    assert ["shapes: a"] == titles(server, "/good") == titles(server, "/bad")


def test_a_rejected_message_does_not_block_the_next(server: Server, sinks: Any) -> None:
    """A message that a service rejects is given up; the next one is sent by itself."""
    sink = sinks()
    server.status[f"/{SECRET}"] = 404
    batch = records(alert("a"), alert("b"))
    with pytest.raises(SinkError, match=r"JSON \(status 404\)") as e:
        sink.write(batch[:1])
    assert "rejected" == classify(e.value)
    server.status[f"/{SECRET}"] = 200
    sink.write(batch[1:])
    assert ["shapes: b"] == titles(server)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"nosuch://{SECRET}", "nosuch://"),
        (f"slack://{SECRET}/x", "slack://"),
        (SECRET, "without ://"),
        (f"json://?{SECRET}", "json://"),
    ],
)
def test_a_bad_url_is_rejected_at_once(
    sinks: Any, server: Server, url: str, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The error says which one it is and shows no more of it than its scheme; no log does."""
    caplog.set_level(1)
    logging.getLogger("apprise").setLevel(1)
    try:
        with pytest.raises(SinkError, match="number 2 of `urls`") as e:
            sinks(urls=[server.url(), url])
    finally:
        logging.getLogger("apprise").setLevel(logging.NOTSET)
    assert shown in str(e.value)
    assert SECRET not in str(e.value) + caplog.text
    assert "rejected" == classify(e.value)


def test_nothing_shows_an_address(
    server: Server, sinks: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither log, repr, `where` nor a file's name has it; other threads are heard as before."""
    caplog.set_level(1)
    sink = sinks()
    sink.write(records(alert("a")))
    server.status[f"/{SECRET}"] = 500
    with pytest.raises(SinkError):
        sink.write(records(alert("a"), alert("b")))
    shown = [caplog.text, str(sink.location), repr(sink), repr(sink.options), str(sink.options)]
    shown += [str(list(sink.options.__rich_repr__()))]
    shown += [str(list(Path(sink.options.state).iterdir()))]
    assert [] == [text for text in shown if SECRET in text]
    assert "JSON" == sink.location
    assert all([] == logging.getLogger(name).filters for name in ("apprise", "urllib3"))
    logging.getLogger("apprise").warning("heard")
    assert "heard" in caplog.text


def test_no_thread_is_left(server: Server, sinks: Any) -> None:
    """Apprise's pool of threads, which the end of the process would wait for, is not begun."""
    sinks().write(records(alert("a")))
    assert [] == [t.name for t in threading.enumerate() if "ThreadPool" in t.name]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("when: [end]", r"sinks\.n.*urls"),
        ("urls: []", r"yaml:5: sinks\.n\.urls: .*1"),
        ("urls: ['']", r"yaml:5: sinks\.n\.urls"),
        ("urls: [x://y]\n    when: [never]", r"yaml:6: sinks\.n\.when"),
        (
            "urls: [x://y]\n    title: '{nmae}'",
            r"found \{nmae\} in title or body, expected \{name\}",
        ),
        ("urls: [x://y]\n    max_age_secs: -1", r"yaml:6: sinks\.n\.max_age_secs"),
    ],
)
def test_options_are_checked(options: str, expected: str) -> None:
    """Each fault is reported with its line and what was expected."""
    text = f"\nsinks:\n  n:\n    type: notify\n    {options}\n"
    with pytest.raises(ConfigError, match=expected):
        config.loads(text, name="bus.yaml")


def test_options_go_to_another_process_whole() -> None:
    """What the sidecar is sent makes the same options."""
    options = NotifyOptions(urls=["x://y"], metric="m", goal="min")
    again = msgspec.convert(msgspec.json.decode(msgspec.json.encode(options)), NotifyOptions)
    assert msgspec.to_builtins(again) == msgspec.json.decode(msgspec.json.encode(options))


@pytest.mark.parametrize("isolation", ["inline", "process"])
def test_a_bus_sends_a_failure(
    server: Server, tmp_path: Path, isolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that raises sends a message in each isolation; the URL comes from a variable."""
    monkeypatch.setenv("NOTIFY_URL", server.url())
    text = f"""
sinks:
  people:
    type: notify
    urls: ["${{NOTIFY_URL}}"]
    state: {tmp_path / "state"}
    isolation: {isolation}
"""

    def train() -> None:
        with config.loads(text) as bus, bus.run(name="n") as run:
            run.log({"loss": 1.5}, step=3)
            raise LookupError("boom")

    with pytest.raises(LookupError, match="boom"):
        train()
    (found,) = got(server)
    assert "n: failed" == found["title"]
    assert "error: LookupError: boom\n" in found["message"]


KILLED = """
import os, signal, sys
from trainbus import config
with config.loads(sys.stdin.read()) as bus, bus.run(name="n") as run:
    run.log({"loss": 1.5}, step=3)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_training_that_is_killed_sends_a_message(server: Server, tmp_path: Path) -> None:
    """Nobody is left in the training process to say it: the sidecar does, once."""
    sink = {"type": "notify", "urls": [server.url()], "state": str(tmp_path / "state")}
    text = json.dumps({"journal": {"dir": str(tmp_path / "runs")}, "sinks": {"people": sink}})
    done = subprocess.run(
        [sys.executable, "-c", KILLED], input=text.encode(), cwd=tmp_path, timeout=60, check=False
    )
    assert -signal.SIGKILL == done.returncode
    deadline = time.monotonic() + 60
    while not got(server):
        assert time.monotonic() < deadline, "waited for 60 s"
        time.sleep(0.02)
    (found,) = got(server)
    assert "n: failed" == found["title"]
    assert found["message"].startswith("error: ProcessLost: the training process was killed")
    assert "\nlast: train/loss 1.5\n" in found["message"]


def test_the_best_that_the_training_names_is_sent(server: Server, sinks: Any) -> None:
    """The end's own best value goes before what was seen."""
    best = Best(metric="fitness", value=0.5, epoch=4)
    sinks().write(records(RunEnded(status="finished", best=best)))
    assert "best: fitness 0.5 in epoch 5\nrun: r" == got(server)[0]["message"]


def test_a_state_that_can_not_be_written_is_an_error(tmp_path: Path, sinks: Any) -> None:
    """The folder is named, with what to set."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SinkError, match=r"can't write .*/file/x: .*; set another `state`"):
        sinks(state=str(tmp_path / "file" / "x"))
