"""What a program prints is recorded as a terminal shows it, and printing never suffers from it."""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainbus.capture.console import ConsoleCapture, ConsoleChunk
from trainbus.capture.terminal import MAX_ROW


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _streams(capsys: pytest.CaptureFixture[str]) -> None:
    """Each test has streams of its own."""


@contextlib.contextmanager
def captured(**options: Any) -> Iterator[list[ConsoleChunk]]:
    """Capture what the block prints."""
    chunks: list[ConsoleChunk] = []
    capture = ConsoleCapture(chunks.append, **{"clock": Clock(), **options})
    capture.start()
    try:
        yield chunks
    finally:
        capture.stop()


def texts(chunks: list[ConsoleChunk]) -> list[str]:
    return [chunk.text for chunk in chunks]


def lines_of(*writes: str) -> list[str]:
    """Return the lines that are recorded of some writes."""
    with captured() as chunks:
        for text in writes:
            sys.stdout.write(text)
    return texts(chunks)


def test_lines_of_both_streams_are_passed_on_in_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each line has its stream, number and time, and the program's output stays the same."""
    clock = Clock()
    with captured(clock=clock) as chunks:
        print("one", "two")
        clock.now += 1
        print("oh", file=sys.stderr)
        sys.stdout.writelines(["a\n", "b\n"])
    assert [
        ConsoleChunk("stdout", "one two", 1, 1000.0),
        ConsoleChunk("stderr", "oh", 2, 1001.0),
        ConsoleChunk("stdout", "a", 3, 1001.0),
        ConsoleChunk("stdout", "b", 4, 1001.0),
    ] == chunks
    assert ("one two\na\nb\n", "oh\n") == capsys.readouterr()


def test_a_line_is_passed_on_when_it_is_complete() -> None:
    """A complete line is there at once, an unfinished one when it is finished or at the end."""
    with captured() as chunks:
        print("one")
        assert ["one"] == texts(chunks)
        print("be", end="")
        assert ["one"] == texts(chunks)
        print("gin")
        assert ["one", "begin"] == texts(chunks)
        print("end", end="")
    assert ["one", "begin", "end"] == texts(chunks)


def test_the_beginning_of_a_line_is_passed_on_after_a_pause() -> None:
    """A line that was left unfinished for a second is replaced when it is finished."""
    clock = Clock()
    with captured(clock=clock) as chunks:
        print("loading", end="")
        clock.now += 1
        print("…", end="")
        print(" done")
    assert [(1, "loading"), (1, "loading… done")] == [(c.line, c.text) for c in chunks]


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        (["a", "", "b"], "a\n\nb\n"),
        (["a", "b"], "a\r\nb"),
        (["100%"], "\r  0%\r 50%\r100%\n"),
        (["xy", "z"], "abc\rxy\x1b[K\nz"),
        (["xyc"], "abc\rxy\n"),
        (["3/3 done"], "1/3\b\b\b2/3\b\b\b3/3 done\n"),
        (["red plain"], "\x1b[1;31mred\x1b[0m plain\n"),
        (["link"], "\x1b]8;;http://x\x1b\\link\x1b]8;;\x07\n"),
        (["new", "below"], "\x1b[1A\x1b[2Knew\nbelow\n"),
        (
            ["a: 2", "b: 2"],
            "\x1b[Aa: 1\n\rb: 1\x1b[A\ra: 2\n\rb: 2\n",
        ),
        (["   x"], "\x1b[3Cx\n"),
        (["a", "c"], "\x1b[Aa\nb\n\x1b[A\x1b[Jc\n"),
        (["spaces  "], "spaces  \n"),
        (["tab\tbell"], "tab\tbe\x07ll\n"),
        ([], "\rgone\r    \r"),
        (["é", "日本"], "é\n日本\n"),
    ],
)
def test_the_text_is_what_a_terminal_shows(expected: list[str], text: str) -> None:
    """Carriage returns, backspaces, cursor movements and erasing are executed, colors removed."""
    assert expected == lines_of(text)


def test_a_bar_becomes_its_last_state() -> None:
    """Of a bar, one state every five seconds is passed on, under one number, and the last one."""
    clock = Clock()
    with captured(clock=clock) as chunks:
        for done in range(101):
            print(f"\r{done}%", end="", file=sys.stderr)
            clock.now += 0.1
        print(file=sys.stderr)
        print("next")
    assert {1, 2} == {chunk.line for chunk in chunks}
    assert ["49%", "99%", "100%", "next"] == texts(chunks)


def test_nested_bars_of_tqdm_become_their_last_states() -> None:
    """Two bars below each other are two lines, whose intermediate states are dropped."""
    tqdm = pytest.importorskip("tqdm").tqdm
    with captured() as chunks:
        for _ in tqdm(range(3), desc="outer", file=sys.stderr, mininterval=0):
            for _ in tqdm(range(4), desc="inner", file=sys.stderr, mininterval=0, leave=False):
                pass
        print("after", file=sys.stderr)
    found = [text for text in texts(chunks) if text]
    assert 2 >= len([text for text in found if text.startswith("outer")])
    assert [] == [text for text in found if text.startswith("inner")]
    assert "outer: 100%" == [text for text in found if text.startswith("outer")][-1][:11]
    assert "after" == found[-1]


pieces = st.sampled_from(
    [
        *("\n", "\r", "\b", "\t", "\x07", "é", "ab", "x", " ", "\x1b", "\x1b[", "\x1b]0;t\x07"),
        *("\x1b[A", "\x1b[2A", "\x1b[B", "\x1b[K", "\x1b[2K", "\x1b[J", "\x1b[31m", "\x1b[5G"),
        *("\x1b[2C", "\x1b[1K", "\x1b[F"),
    ]
)


@given(st.lists(pieces, max_size=30).map("".join), st.data())
def test_where_a_text_is_cut_makes_no_difference(text: str, data: st.DataObject) -> None:
    """The same text in other writes, also cut inside of a sequence, has the same lines."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    writes = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert lines_of(text) == lines_of(*writes)


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"])).map(lambda text: text + "\n"))
def test_plain_text_is_recorded_as_it_is(text: str) -> None:
    """A text without control characters is not changed."""
    with captured(redact=lambda line: line) as chunks:
        sys.stdout.write(text)
    assert [text[:-1]] == texts(chunks)


def test_an_endless_line_is_cut() -> None:
    """A line that never ends costs no more than a bounded amount of memory."""
    found = lines_of("x" * MAX_ROW, "y\n")
    assert [MAX_ROW, 1] == [len(text) for text in found]


def test_a_secret_in_two_writes_is_replaced() -> None:
    """Whole lines are redacted, and all lines of a private key."""
    token = "ghp_" + "a1B2" * 9
    assert ["token=[redacted]"] == lines_of("token=", token[:9], token[9:], "\n")
    key = ["-----BEGIN PRIVATE KEY-----", "MIIabc", "-----END PRIVATE KEY-----", "after"]
    assert ["[redacted]"] * 3 + ["after"] == lines_of(*(f"{line}\n" for line in key))


def test_the_middle_is_dropped_beyond_the_limit() -> None:
    """The first half is passed on at once, the newest lines at the end, with what is missing."""
    with captured(max_bytes=60) as chunks:
        for number in range(20):
            print(f"line {number:04}")  # 10 bytes with its line feed
        assert ["line 0000", "line 0001", "line 0002"] == texts(chunks)
    assert "[14 lines (140 bytes) dropped]" == chunks[3].text
    assert (4, 14, 140) == (chunks[3].line, chunks[3].dropped_lines, chunks[3].dropped_bytes)
    assert ["line 0017", "line 0018", "line 0019"] == texts(chunks[4:])


@pytest.mark.parametrize("order", ["first", "last"])
def test_two_captures_get_everything_and_leave_nothing(order: str) -> None:
    """Captures that overlap each get all lines, and the streams are as before in any order."""
    before = dict(vars(sys.stdout)), dict(vars(sys.stderr))
    one: list[ConsoleChunk] = []
    two: list[ConsoleChunk] = []
    first, second = ConsoleCapture(one.append), ConsoleCapture(two.append)
    first.start()
    second.start()
    first.start()
    print("both")
    (first if order == "first" else second).stop()
    print("one")
    (second if order == "first" else first).stop()
    first.stop()
    print("none")
    assert {("both",), ("both", "one")} == {tuple(texts(one)), tuple(texts(two))}
    assert before == (dict(vars(sys.stdout)), dict(vars(sys.stderr)))


def test_a_write_of_somebody_else_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What wraps `write` after the start stays in place, and what was there before comes back."""
    out: Any = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    heard: list[str] = []
    own = out.write
    out.write = own_write = lambda text: own(text)
    with captured():
        pass
    assert own_write is out.write
    with captured() as chunks:
        inner: Any = vars(out)["write"]

        def outer(text: str) -> int:
            heard.append(text)
            return int(inner(text))

        out.write = outer
        print("x")
    print("y")
    assert outer is out.write
    assert (["x", "\n", "y", "\n"], ["x"]) == (heard, texts(chunks))


def test_handlers_that_were_there_before_are_captured() -> None:
    """A logging handler holds the stream object, which stays the same."""
    log = logging.Logger("some")
    log.addHandler(logging.StreamHandler(sys.stderr))
    with captured() as chunks:
        log.warning("careful")
    assert [("stderr", "careful")] == [(chunk.stream, chunk.text) for chunk in chunks]


def test_a_real_text_stream_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The type of a program's own stdout can be wrapped, and stays what it is."""
    buffer = io.BytesIO()
    out = io.TextIOWrapper(buffer, encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    with captured() as chunks:
        assert out is sys.stdout
        print("µ", flush=True)
        out.writelines(["a\n"])
    assert (["µ", "a"], {}) == (texts(chunks), vars(out))
    assert "µ\n" == buffer.getvalue().decode()[:2]


class Slotted:
    """A stream whose attributes can't be set."""

    __slots__ = ("written",)

    def __init__(self) -> None:
        self.written = ""

    def write(self, text: str) -> int:
        self.written += text
        return len(text)

    def flush(self) -> None:
        pass


def test_a_stream_whose_attributes_can_not_be_set_gets_a_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A proxy with all that the stream has takes its place until all captures have stopped."""
    stream = Slotted()
    monkeypatch.setattr(sys, "stdout", stream)
    with captured() as outer:
        with captured() as inner:
            print("both")
            proxy: Any = sys.stdout
            assert "both\n" == proxy.written
        print("one")
    assert (["both", "one"], ["both"]) == (texts(outer), texts(inner))
    assert stream is sys.stdout
    print("none")
    assert "both\none\nnone\n" == stream.written


def test_streams_may_be_missing_closed_or_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a console there is nothing to capture; one object for both is captured once."""
    closed = io.StringIO()
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", closed)
    with captured() as chunks:
        print("nowhere")
        print("x", file=sys.stderr)
        closed.close()
        with pytest.raises(ValueError, match="closed"):
            print("y", file=closed)
        monkeypatch.setattr(sys, "stderr", io.StringIO())  # pytest itself writes to it
    assert ["x"] == texts(chunks)
    both = io.StringIO()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)
    with captured() as chunks:
        print("once", file=sys.stderr)
    assert ["once"] == texts(chunks)


def test_a_replaced_stream_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to a replacement is not captured, and the replacement stays after the end."""
    out = sys.stdout
    elsewhere = io.StringIO()
    with captured() as chunks:
        with contextlib.redirect_stdout(elsewhere):
            print("hidden")
        print("shown")
        monkeypatch.setattr(sys, "stdout", elsewhere)
    assert (["shown"], elsewhere) == (texts(chunks), sys.stdout)
    assert {} == vars(out)


def test_a_fault_ends_the_capture_with_one_warning(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the callback never reaches the program, which continues to print."""

    def broken(chunk: ConsoleChunk) -> None:
        raise RuntimeError("disk full")

    capture = ConsoleCapture(broken)
    capture.start()
    print("one")
    print("two")
    capture.stop()
    assert "one\ntwo\n" == capsys.readouterr().out
    expected = "the output of the program is no longer captured: RuntimeError: disk full"
    assert [expected] == [record.message for record in caplog.records]


def test_a_callback_may_print() -> None:
    """What is printed while a line is passed on follows it; without end, the capture ends."""
    found: list[str] = []

    def chatty(chunk: ConsoleChunk) -> None:
        found.append(chunk.text)
        if chunk.text == "one":
            print("from the callback")

    capture = ConsoleCapture(chatty)
    capture.start()
    print("one")
    print("two")
    capture.stop()
    assert ["one", "from the callback", "two"] == found


def test_a_callback_that_prints_without_end_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    """A callback that prints for each line does not block the program for ever."""
    capture = ConsoleCapture(lambda chunk: print("again"))
    capture.start()
    print("one")
    capture.stop()
    assert 1 == len(caplog.records)
    assert "prints without end" in caplog.text


def test_a_callback_may_stop_the_capture() -> None:
    """`stop` in the callback ends the capture and waits for nothing."""
    found: list[str] = []

    def once(chunk: ConsoleChunk) -> None:
        found.append(chunk.text)
        capture.stop()

    capture = ConsoleCapture(once)
    capture.start()
    print("one")
    print("two")
    assert (["one"], {}) == (found, vars(sys.stdout))


@pytest.mark.skipif(not hasattr(signal, "raise_signal"), reason="needs signals")
def test_a_signal_handler_may_print_and_raise() -> None:
    """A handler that runs while a line is passed on loses nothing, and its exception is kept."""
    found: list[str] = []

    def handler(number: int, frame: object) -> None:
        print("from the handler")
        if "two" in found:
            raise TimeoutError("time is up")

    def write(chunk: ConsoleChunk) -> None:
        found.append(chunk.text)
        if chunk.text in ("one", "two"):
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, handler)
    capture = ConsoleCapture(write)
    capture.start()
    try:
        print("one")
        with pytest.raises(TimeoutError):
            print("two")
        print("three")
    finally:
        capture.stop()
        signal.signal(signal.SIGTERM, before)
    assert ["one", "from the handler", "two", "from the handler", "three"] == found


def test_threads_lose_no_line() -> None:
    """All lines of several threads arrive whole, once, and in the order of each thread."""
    with captured() as chunks:

        def work(name: int) -> None:
            for number in range(300):
                sys.stdout.write(f"{name} {number}\n")

        threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert list(range(1, 1201)) == [chunk.line for chunk in chunks]
    for name in range(4):
        mine = [text for text in texts(chunks) if text.startswith(f"{name} ")]
        assert [f"{name} {number}" for number in range(300)] == mine


def test_a_blocked_callback_blocks_no_other_thread() -> None:
    """While one thread waits in the callback, another one prints; its line follows."""
    entered, go_on = threading.Event(), threading.Event()
    found: list[str] = []

    def write(chunk: ConsoleChunk) -> None:
        found.append(chunk.text)
        entered.set()
        assert go_on.wait(60)

    capture = ConsoleCapture(write)
    capture.start()
    thread = threading.Thread(target=print, args=("one",))
    thread.start()
    assert entered.wait(60)
    print("two")
    assert ["one"] == found
    go_on.set()
    thread.join()
    capture.stop()
    assert ["one", "two"] == found


def test_text_that_is_no_text_is_the_streams_matter() -> None:
    """The stream's own error for a wrong argument reaches the program."""
    with captured() as chunks, pytest.raises(TypeError):
        sys.stdout.write(b"x")  # type: ignore[arg-type]
    assert [] == chunks
