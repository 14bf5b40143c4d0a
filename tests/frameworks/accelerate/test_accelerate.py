"""The accelerate adapter in real loops: the suite, the tracker's own idiom, checkpoints, ranks."""

from __future__ import annotations

import copy
import math
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
from trainbus.adapters import accelerate as adapter

import trainbus
from support.feeding import feeding
from support.heard import Heard
from trainbus import AttachError, Bus
from trainbus.events import (
    CheckpointSaved,
    ImageLogged,
    MetricsLogged,
    ModelDescribed,
    ParamsUpdated,
    Record,
    RunEnded,
    RunStarted,
    TableLogged,
    TextLogged,
    decode,
    event_name,
)
from trainbus.recording.emitter import NullEmitter
from trainbus.testing import AdapterConformance, MemorySink, Training, check_grammar

# torch and accelerate warn of their own deprecations.
pytestmark = pytest.mark.filterwarnings("default")

SCRIPT = Path(__file__).parents[2] / "support" / "accelerate_ddp.py"
TWO = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


def accelerator(folder: Path | None = None, **options: Any) -> Any:
    """Return an accelerator on the CPU that names its checkpoints itself."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    if folder is not None:
        options["project_config"] = ProjectConfiguration(
            project_dir=str(folder), automatic_checkpoint_naming=True
        )
    return Accelerator(cpu=True, **options)


class Loop:
    """A loop as accelerate's examples have it: three batches an epoch, the loss of each."""

    def __init__(self, accelerator: Any, epochs: int, *, resumed: bool = False) -> None:
        self.accelerator = accelerator
        self.epochs = epochs
        self.resumed = resumed
        self.losses: list[float] = []
        self.on_epoch: Callable[[int], None] = lambda epoch: None
        self.model: Any = None

    def prepare(self) -> tuple[Any, Any, Any]:
        import torch

        torch.manual_seed(0)
        self.model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        points = torch.randn(12, 2)
        data = torch.utils.data.TensorDataset(points, points.sum(1, keepdim=True))
        loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
        if self.accelerator.process_index == 1:  # the fake process group can't average gradients
            return self.model, *self.accelerator.prepare(optimizer, loader)
        prepared: tuple[Any, Any, Any] = self.accelerator.prepare(self.model, optimizer, loader)
        return prepared

    def run(self) -> None:
        import torch

        self.accelerator.init_trackers("tiny", {"lr": 0.1, "epochs": self.epochs})
        model, optimizer, loader = self.prepare()
        first = 0
        if self.resumed:
            self.accelerator.load_state()
            first = 1
        for epoch in range(first, self.epochs):
            self.on_epoch(epoch)
            for x, y in loader:
                loss = torch.nn.functional.mse_loss(model(x), y)
                self.accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                self.losses.append(float(loss.detach()))
                self.accelerator.log({"loss": loss.detach()}, step=len(self.losses))
            self.accelerator.log({"val_loss": self.losses[-1], "epoch": epoch})
            if self.accelerator.project_configuration.automatic_checkpoint_naming:
                self.accelerator.save_state()
        self.accelerator.end_training()

    def weights(self) -> bytes:
        return b"".join(p.detach().numpy().tobytes() for p in self.model.parameters())


def set_up(folder: Path, epochs: int, *, resumed: bool = False) -> Training:
    """Return a training for the suite; under `TWO`, as the other of two processes."""
    if os.environ.get("RANK") == "1":
        import torch
        from torch.testing._internal.distributed.fake_pg import FakeStore

        torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    loop = Loop(accelerator(folder), epochs, resumed=resumed)
    if resumed:
        loop.accelerator.project_configuration.iteration = 1

    def fail_at(error: BaseException) -> None:
        def fail(epoch: int) -> None:
            if epoch == 1:
                raise error

        loop.on_epoch = fail

    return Training(
        target=loop.accelerator,
        run=loop.run,
        result=loop.weights,
        fail_at=fail_at,
        resume=lambda: set_up(folder, epochs, resumed=True),
    )


class TestConformance(AdapterConformance):
    has_epochs = False
    other_rank_env = TWO | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def start(self, folder: Path, epochs: int) -> Training:
        return set_up(folder, epochs)

    def trace(self, target: Any) -> object:
        return vars(target).keys(), list(target.log_with), list(target.trackers)


@pytest.fixture
def memory() -> MemorySink:
    return MemorySink()


@pytest.fixture
def bus(memory: MemorySink) -> Bus:
    return Bus({"memory": memory}, on_receipt=lambda receipt: None)


def tracker(bus: Bus) -> Any:
    from trainbus.adapters.accelerate import BusTracker

    return BusTracker(bus)


def of(memory: MemorySink, kind: type[Any]) -> list[Any]:
    return [event for event in memory.events if isinstance(event, kind)]


def comparable(memory: MemorySink) -> list[str]:
    """Return what was recorded, without what differs between two equal runs."""
    return [repr(event) for event in memory.events]


# The idiom, and attaching -------------------------------------------------------------------------


def test_the_losses_are_those_of_the_loop(tmp_path: Path, bus: Bus, memory: MemorySink) -> None:
    """Metrics have the program's names, values, steps and epochs; names decide the phase."""
    loop = Loop(accelerator(tmp_path), 3)
    bus.attach(loop.accelerator)
    loop.run()
    logged = of(memory, MetricsLogged)
    steps = [(e.values, e.step, e.epoch) for e in logged if e.phase == "train"]
    assert [({"loss": v}, i, None) for i, v in enumerate(loop.losses, 1)] == steps
    summaries = [(e.values, e.step, e.epoch) for e in logged if e.phase == "validation"]
    last = loop.losses[2::3]
    assert [({"val_loss": v}, None, i) for i, v in enumerate(last)] == summaries
    assert len(steps) + len(summaries) == len(logged)


def test_the_start_says_what_is_known(tmp_path: Path, bus: Bus, memory: MemorySink) -> None:
    """Project and configuration are those of `init_trackers`; the model is counted."""
    import accelerate

    loop = Loop(accelerator(tmp_path, gradient_accumulation_steps=2), 1)
    bus.attach(loop.accelerator)
    loop.run()
    (started,) = of(memory, RunStarted)
    settings = started.params.pop("accelerate")
    expected = RunStarted(
        project="tiny",
        params={"lr": 0.1, "epochs": 1},
        framework="accelerate",
        framework_version=accelerate.__version__,
        save_dir=str(tmp_path),
    )
    assert expected == started
    assert ("no", 2, 1, "cpu") == (
        *(settings["mixed_precision"], settings["gradient_accumulation_steps"]),
        *(settings["num_processes"], settings["device"]),
    )
    assert [ModelDescribed(parameters=3, gradients=3)] == of(memory, ModelDescribed)


def test_the_idiom_gives_the_same_records(tmp_path: Path, bus: Bus, memory: MemorySink) -> None:
    """`Accelerator(log_with=BusTracker(bus))` reports what an attached accelerator reports."""
    attached = Loop(accelerator(tmp_path), 2)
    bus.attach(attached.accelerator)
    attached.run()
    bus.close()
    (tmp_path / "checkpoints").rename(tmp_path / "old")
    own, mine = Bus({"mine": (sink := MemorySink())}, on_receipt=lambda receipt: None), sink
    Loop(accelerator(tmp_path, log_with=tracker(own)), 2).run()
    assert comparable(memory) == comparable(mine)
    assert [] == check_grammar(mine.records)


def test_the_idiom_stands_beside_other_trackers(bus: Bus, memory: MemorySink) -> None:
    """Another tracker in the list gets what it gets without ours, and is found by its name."""
    from accelerate.tracking import GeneralTracker

    class Other(GeneralTracker):  # type: ignore[misc]
        name = "other"
        requires_logging_directory = False
        tracker = None
        heard: list[object] = []  # noqa: RUF012

        def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
            self.heard.append((values, step))

    own = tracker(bus)
    both = accelerator(log_with=[own, Other()])
    both.init_trackers("tiny")
    both.log({"loss": 0.5}, step=1)
    assert own is both.get_tracker("trainbus")
    assert own.report.emit is both.get_tracker("trainbus", unwrap=True)
    both.end_training()
    assert [({"loss": 0.5}, 1)] == Other.heard
    assert [MetricsLogged(values={"loss": 0.5}, phase="train", step=1)] == of(memory, MetricsLogged)


def test_it_is_a_tracker_of_accelerate(bus: Bus) -> None:
    """It has what accelerate asks of a custom tracker, and overrides every method of the base."""
    from accelerate.tracking import GeneralTracker

    own = tracker(bus)
    assert isinstance(own, GeneralTracker)
    assert ("trainbus", False, True) == (
        *(own.name, own.requires_logging_directory, own.main_process_only),
    )
    for name in ("start", "store_init_configuration", "log", "finish"):
        assert getattr(GeneralTracker, name) is not getattr(type(own), name)


def test_it_can_be_attached_after_init_trackers(bus: Bus, memory: MemorySink) -> None:
    """An accelerator whose trackers are initialized, or that has none, reports the same."""
    late = accelerator()
    late.init_trackers("tiny", {"lr": 0.1})
    bus.attach(late)
    late.log({"loss": 0.5}, step=1)
    late.end_training()
    assert ["run.started", "metrics.logged", "run.ended"] == [event_name(e) for e in memory.events]


def test_a_tracker_of_the_program_is_not_doubled(bus: Bus, memory: MemorySink) -> None:
    """Attaching an accelerator that has a `BusTracker` reports everything once."""
    loop = Loop(accelerator(log_with=tracker(bus)), 1)
    bus.attach(loop.accelerator).detach()
    bus.attach(loop.accelerator)
    loop.run()
    assert 1 == len(of(memory, RunStarted))
    assert [1, 2, 3, None] == [event.step for event in of(memory, MetricsLogged)]


def test_two_trainings_are_two_runs(bus: Bus) -> None:
    """`init_trackers` again is a new run, in which each value still comes once."""
    records: list[Record] = []
    bus.subscribe(records.append)
    for own in (accelerator(log_with=tracker(bus)), accelerator()):
        bus.attach(own)
        for _ in range(2):
            Loop(own, 1).run()
    runs = list(dict.fromkeys(record.run for record in records))
    assert 4 == len(runs)
    for run in runs:
        mine = [record for record in records if record.run == run]
        assert [] == check_grammar(mine)
        steps = [r.event.step for r in mine if isinstance(r.event, MetricsLogged)]
        assert [1, 2, 3, None] == steps


def test_only_an_accelerator_can_be_attached(bus: Bus) -> None:
    """The error says what was found and what to attach."""
    import torch

    loop = Loop(accelerator(), 1)
    _, optimizer, _ = loop.prepare()
    assert isinstance(optimizer, torch.optim.Optimizer)
    expected = "expected an Accelerator or a BusTracker, found AcceleratedOptimizer; attach the acc"
    with pytest.raises(AttachError, match=expected):
        bus.attach(optimizer)


# Values -------------------------------------------------------------------------------------------


def test_names_decide_the_phase(bus: Bus, memory: MemorySink) -> None:
    """One call with values of several phases is one event for each of them."""
    own = accelerator(log_with=tracker(bus))
    own.init_trackers("tiny")
    names = {
        "train": ["loss", "train/loss", "value", "lr", "evaluation_time", "testing"],
        "validation": ["val/a", "val_a", "valid_a", "validation/a", "valid", "eval_a", "eval/a"],
        "test": ["test/a", "test_a"],
    }
    own.log({name: 1 for some in names.values() for name in some}, step=4)
    own.end_training()
    found = {event.phase: list(event.values) for event in of(memory, MetricsLogged)}
    assert names == found


def test_counters_are_no_metrics(bus: Bus, memory: MemorySink) -> None:
    """`epoch` is the event's, from the values or the arguments of `log`, if it is whole."""
    own = accelerator(log_with=tracker(bus))
    own.init_trackers("tiny")
    own.log({"loss": 1.0, "epoch": 2}, step=5)
    own.log({"loss": 1.0, "epoch": 0.5}, step=6)
    own.log({"loss": 1.0, "step": 7, "global_step": 7}, step=7)
    own.log({"loss": 1.0}, log_kwargs={"trainbus": {"epoch": 3}})
    own.log({"loss": 1.0, "step": 8})
    own.end_training()
    found = [(e.values, e.epoch, e.step) for e in of(memory, MetricsLogged)]
    loss = {"loss": 1.0}
    assert [
        *((loss, 2, 5), (loss, None, 6), (loss, None, 7), (loss, 3, None)),
        (loss | {"step": 8.0}, None, None),
    ] == found


def test_every_kind_of_value_arrives(bus: Bus, memory: MemorySink) -> None:
    """NaN and tensors are numbers, values of a dictionary get its name, and words are texts."""
    import torch

    own = accelerator(log_with=tracker(bus))
    own.init_trackers("tiny")
    values = {"nan": math.nan, "t": torch.tensor([2.0]), "d": {"a": 1, "b": 2}, "note": "hello"}
    own.log(values, step=torch.tensor(3))
    own.end_training()
    (event,) = of(memory, MetricsLogged)
    assert math.isnan(event.values.pop("nan"))
    assert ({"t": 2.0, "d/a": 1.0, "d/b": 2.0}, 3) == (event.values, event.step)
    assert [TextLogged(key="note", text="hello", step=3)] == of(memory, TextLogged)


def test_pictures_and_deeper_values_arrive(bus: Bus, memory: MemorySink) -> None:
    """A picture is one, also as accelerate's users wrap it for W&B, and a mapping is flattened."""
    import numpy as np
    import wandb

    own = accelerator(log_with=tracker(bus))
    own.init_trackers("tiny")
    pixels = np.zeros((8, 9, 3), dtype=np.uint8)
    values = {"val/a": {"b": {"c": 0.5}}, "picture": pixels, "wrapped": wandb.Image(pixels)}
    own.log({**values, "table": wandb.Table(columns=["x"], data=[[1]]), "raw": b"x"}, step=2)
    own.end_training()
    (event,) = of(memory, MetricsLogged)
    assert ({"val/a/b/c": 0.5}, "validation") == (event.values, event.phase)
    pictures = {e.key: (e.array.shape, e.step) for e in of(memory, ImageLogged)}
    assert {"picture": ((8, 9, 3), 2), "wrapped": ((8, 9, 3), 2)} == pictures
    assert [TableLogged(key="table", columns=["x"], rows=[[1]], step=2)] == of(memory, TableLogged)
    bus.close()
    assert 1 == bus.receipts[0].unrecorded


def test_a_later_configuration_is_an_update(bus: Bus, memory: MemorySink) -> None:
    """`store_init_configuration` of a run that has begun changes its parameters."""
    own = accelerator(log_with=tracker(bus))
    own.init_trackers("tiny")
    own.log({"loss": 1.0})
    own.get_tracker("trainbus").store_init_configuration({"lr": 0.2})
    own.end_training()
    assert [ParamsUpdated(params={"lr": 0.2})] == of(memory, ParamsUpdated)


def test_a_value_that_can_not_be_read_stops_nothing(
    bus: Bus, memory: MemorySink, caplog: pytest.LogCaptureFixture
) -> None:
    """What goes wrong in the tracker costs that call's events, and is said."""
    own = accelerator(log_with=tracker(bus))
    own.init_trackers("tiny")
    own.log([("loss", 1.0)])
    own.log({"loss": 1.0})
    own.end_training()
    assert 1 == len(of(memory, MetricsLogged))
    assert "hook log in trainbus.adapters.accelerate raised" in caplog.text


# Checkpoints, resuming, ends ----------------------------------------------------------------------


def test_checkpoints_exist_when_they_are_recorded(tmp_path: Path, bus: Bus) -> None:
    """Each folder that the accelerator names is periodic, and complete when it is recorded."""
    heard: list[tuple[Any, set[str]]] = []

    def listen(record: Record) -> None:
        assert isinstance(record.event, CheckpointSaved)
        heard.append((record.event, {p.name for p in Path(record.event.path).iterdir()}))

    bus.subscribe(listen, CheckpointSaved)
    loop = Loop(accelerator(tmp_path), 2)
    bus.attach(loop.accelerator)
    loop.run()
    for iteration, (event, files) in enumerate(heard):
        path = tmp_path / "checkpoints" / f"checkpoint_{iteration}"
        assert CheckpointSaved(path=str(path), kind="periodic") == event
        assert {p.name for p in path.iterdir()} == files
        assert {"model.safetensors", "optimizer.bin", "random_states_0.pkl"} <= files
    assert 2 == len(heard)


def test_a_folder_that_is_saved_again_is_the_last(tmp_path: Path, bus: Bus) -> None:
    """A path of the program's own is the last state from the second time on."""
    saved: list[Any] = []
    bus.subscribe(lambda record: saved.append(record.event), CheckpointSaved)
    own = accelerator(log_with=tracker(bus))
    own.init_trackers("tiny")
    for _ in range(2):
        assert str(tmp_path / "state") == str(own.save_state(tmp_path / "state"))
    own.end_training()
    expected = [(str(tmp_path / "state"), kind) for kind in ("periodic", "last")]
    assert expected == [(event.path, event.kind) for event in saved]


@pytest.mark.parametrize("order", ["load, init", "init, load"])
def test_load_state_is_resuming_on_either_side_of_init_trackers(
    order: str, tmp_path: Path, bus: Bus, memory: MemorySink
) -> None:
    """A state that is loaded before the first backward pass is gone on with, in the same run."""
    first, ids = Loop(accelerator(tmp_path), 1), []
    bus.subscribe(lambda record: ids.append(record.run), RunStarted)
    bus.attach(first.accelerator)
    first.run()
    elsewhere = accelerator()
    bus.attach(elsewhere)
    state = str(tmp_path / "checkpoints" / "checkpoint_0")
    loop = Loop(elsewhere, 1)
    loop.prepare()
    if order == "load, init":
        elsewhere.load_state(state)
    elsewhere.init_trackers("tiny")
    if order == "init, load":
        elsewhere.load_state(input_dir=state)
    elsewhere.log({"loss": 1.0})
    elsewhere.load_state(state)
    elsewhere.end_training()
    elsewhere.init_trackers("tiny")
    elsewhere.log({"loss": 1.0})
    elsewhere.end_training()
    resumed = [event.resumed for event in of(memory, RunStarted)]
    assert [False, True, False] == [r is not None for r in resumed]
    assert str(tmp_path) == resumed[1].save_dir
    assert [True, False] == [ids[0] == ids[1], ids[1] == ids[2]]


def test_the_idiom_resumes_too(tmp_path: Path) -> None:
    """With a `BusTracker` alone, a state that is loaded after `init_trackers` is gone on with."""
    records: list[Record] = []
    for resumed in (False, True):
        bus = Bus(on_receipt=lambda receipt: None)
        bus.subscribe(records.append)
        own = accelerator(tmp_path, log_with=tracker(bus))
        own.project_configuration.iteration = int(resumed)
        Loop(own, 1 + resumed, resumed=resumed).run()
    assert 1 == len({record.run for record in records})
    assert {1, 2} == {record.attempt for record in records}


def test_a_training_that_never_ends_itself_is_ended(bus: Bus, memory: MemorySink) -> None:
    """Without `end_training` the bus ends the run, when it is closed."""
    with bus:
        own = accelerator(log_with=tracker(bus))
        own.init_trackers("tiny")
        own.log({"loss": 1.0})
    assert RunEnded(status="finished") == memory.events[-1]


@pytest.mark.parametrize("idiom", [True, False])
def test_a_failure_before_the_first_step_is_recorded(
    idiom: bool, bus: Bus, memory: MemorySink
) -> None:
    """An exception after `init_trackers` ends a run, which starts only then."""

    def leave() -> None:
        with bus:
            own = accelerator(log_with=tracker(bus) if idiom else None)
            bus.attach(own)
            own.init_trackers("tiny")
            raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        leave()
    assert ["run.started", "run.ended"] == [event_name(event) for event in memory.events]
    (ended,) = of(memory, RunEnded)
    assert ("failed", "ValueError: no data") == (ended.status, ended.reason)


def test_nothing_is_emitted_without_init_trackers(bus: Bus, memory: MemorySink) -> None:
    """A `BusTracker` whose accelerator never initializes its trackers emits nothing."""
    own = accelerator(log_with=tracker(bus))
    own.log({"loss": 1.0})
    own.end_training()
    assert [] == memory.events


# Copies, imports, hooks ---------------------------------------------------------------------------


def test_a_tracker_can_be_copied_and_pickled(tmp_path: Path, bus: Bus) -> None:
    """A tracker in use leaves its accelerator out, and its copies have a way to the bus."""
    own = accelerator(tmp_path, log_with=tracker(bus))
    own.init_trackers("tiny")
    own.log({"loss": 1.0})
    (used,) = own.trackers
    copied, revived = copy.deepcopy(used), pickle.loads(pickle.dumps(used))
    assert type(used) is type(copied) is type(revived)
    assert used.report.emit is copied.report.emit
    assert isinstance(revived.report.emit, NullEmitter)
    assert not copied.report.is_open
    assert not revived.report.is_open
    bus.close()


def test_an_attached_accelerator_has_the_trackers_it_had(bus: Bus) -> None:
    """What the program finds in `trackers` and by `get_tracker` is as without trainbus."""
    own = accelerator()
    bus.attach(own)
    own.init_trackers("tiny")
    assert [] == own.trackers == own.log_with
    own.get_tracker("wandb").log({"loss": 1.0})


def test_importing_the_adapter_imports_no_framework() -> None:
    """Neither accelerate nor torch is loaded by the adapter's module."""
    check = (
        "import sys, trainbus.adapters.accelerate; print({'torch', 'accelerate'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert "set()" == done.stdout.strip()


def test_the_hook_attaches_each_accelerator_once(tmp_path: Path) -> None:
    """The hook attaches an accelerator at `init_trackers`, once; signatures stay."""
    source = """
        import inspect
        from accelerate import Accelerator, accelerator as module
        from trainbus import Bus
        from trainbus.adapters.accelerate import BusTracker, hook
        from trainbus.events import event_name

        bus, names, attached = Bus(on_receipt=lambda receipt: None), [], []
        bus.subscribe(lambda record: names.append(event_name(record.event)))

        def attach(target):
            attached.append(target)
            bus.attach(target)

        before = Accelerator.init_trackers
        hook(module, attach)
        hooked = Accelerator.init_trackers
        hook(module, attach)
        assert hooked is Accelerator.init_trackers
        assert inspect.signature(before) == inspect.signature(hooked)
        assert (before.__name__, before.__doc__) == (hooked.__name__, hooked.__doc__)

        silent = Accelerator(cpu=True)
        silent.log({"loss": 1.0})
        silent.end_training()
        assert [] == attached == names

        for own in (Accelerator(cpu=True), Accelerator(cpu=True, log_with=BusTracker(bus))):
            for _ in range(2):
                own.init_trackers("tiny", config={"lr": 0.1})
                own.log({"loss": 1.0}, step=1)
                own.end_training()
        assert 1 == len(attached), attached
        assert ["run.started", "metrics.logged", "run.ended"] * 4 == names, names
    """
    lines = [line[8:] for line in source.splitlines()]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == done.returncode, done.stderr


# Ranks --------------------------------------------------------------------------------------------


def launch(folder: Path, *arguments: str) -> tuple[int, list[Any], list[str]]:
    """Train in two processes; return the exit code, the only run's events and its files."""
    (folder / "config.yaml").write_text("sinks: {kept: {type: jsonl, path: kept.jsonl}}\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "--master_port", port, str(SCRIPT), *arguments],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    (run,) = [p for p in (folder / "trainbus-runs").iterdir() if not p.name.startswith(".")]
    lines = (run / "r0-a1.jsonl").read_bytes().splitlines()
    records = [decode(b"{" + line.split(b",", 1)[1]) for line in lines]
    assert [] == check_grammar(records), done.stderr
    files = sorted(p.name for p in run.iterdir() if p.name.startswith("r") and "-a" in p.name)
    return done.returncode, [record.event for record in records], files


@pytest.mark.parametrize("idiom", ["tracker", "attach"])
def test_two_processes_have_one_run(idiom: str, tmp_path: Path) -> None:
    """Rank 0 of two processes reports metrics and checkpoints once; rank 1 leaves no journal."""
    code, events, files = launch(tmp_path, idiom)
    assert 0 == code
    assert ["r0-a1.jsonl"] == files
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    assert 2 == started.world_size
    measured = [(e.step, e.values) for e in events if isinstance(e, MetricsLogged)]
    assert [(step, {"rank": 0.0, "sum": 1.0}) for step in (1, 2)] == measured
    (saved,) = [event for event in events if isinstance(event, CheckpointSaved)]
    assert Path(saved.path).is_dir()
    assert RunEnded(status="finished") == events[-1]


@pytest.mark.parametrize("idiom", ["tracker", "no-with"])
def test_a_failure_of_rank_1_is_the_end_of_the_run(idiom: str, tmp_path: Path) -> None:
    """The run ends with the true cause, and not with the broken connection that rank 0 sees."""
    code, events, files = launch(tmp_path, idiom, "fail")
    assert 0 != code
    assert ["r0-a1.jsonl", "r1-a1.jsonl"] == files
    assert "failed" == events[-1].status
    assert "rank 1: ValueError: boom on rank 1" == events[-1].reason
    assert "boom on rank 1" in events[-1].error.traceback


def test_a_tracker_that_goes_to_a_second_bus_stays_with_it() -> None:
    """The first bus, when it is closed, has let go of it."""
    first, second = trainbus.Bus(), trainbus.Bus()
    given = tracker(first)
    second.attach(given)
    first.close()
    assert given.report.active
    second.close()
    assert not given.report.active


def test_a_tracker_of_accelerate_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What `log_with` names, and a sink feeds too, is said in one line and in the run's start."""
    heard = feeding("tensorboard")
    own = accelerator(tmp_path, log_with="tensorboard")
    heard.bus.attach(own)
    own.init_trackers("tiny")
    own.log({"loss": 1.0}, step=1)
    own.end_training()
    assert [["tensorboard"]] == [started.own_loggers for started in heard.of(RunStarted)]
    assert [
        "accelerate's own TensorBoardTracker and a sink of trainbus both log to TensorBoard; "
        "remove one of them (leave its name out of log_with)"
    ] == [line for line in caplog.messages if "both log" in line]


def test_pictures_and_tables_are_logged_by_the_tracker(bus: Bus, memory: MemorySink) -> None:
    """By the methods that accelerate's own trackers have, with what they take."""
    import torch
    from PIL import Image

    own = accelerator(log_with=tracker(bus))
    own.init_trackers("tiny")
    red = np.zeros((4, 5, 3), dtype=np.uint8)
    red[..., 0] = 255
    used = own.get_tracker("trainbus")
    used.log_images({"one": [Image.fromarray(red)], "two": [red, torch.zeros(4, 5)]}, step=3)
    used.log_images({"batch": np.stack([red.transpose(2, 0, 1)])}, dataformats="NCHW")
    used.log_table("results", columns=["name", "score"], data=[["a", 0.5]], step=4)
    used.log_table("frame", dataframe=polars.DataFrame({"x": [1, 2], "y": ["b", "c"]}), epoch=2)
    own.end_training()
    pictures = of(memory, ImageLogged)
    assert [("one", 3), ("two/0", 3), ("two/1", 3), ("batch", None)] == [
        (picture.key, picture.step) for picture in pictures
    ]
    assert all(np.array_equal(red, pictures[i].array) for i in (0, 1, 3))
    assert (4, 5) == pictures[2].array.shape
    tables = of(memory, TableLogged)
    assert [("results", ["name", "score"], [["a", 0.5]], None, 4)] == [
        (t.key, t.columns, t.rows, t.epoch, t.step) for t in tables[:1]
    ]
    assert (["x", "y"], [[1, "b"], [2, "c"]], 2) == (
        tables[1].columns,
        tables[1].rows,
        tables[1].epoch,
    )


@pytest.fixture
def registered() -> Iterator[None]:
    """`log_with="trainbus"` is known."""
    from accelerate import tracking

    tracking.register_tracker_class(adapter.BusTracker)
    yield
    del tracking.LOGGER_TYPE_TO_CLASS["trainbus"]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("idiom", ["init_kwargs", "attach", "both"])
def test_a_registered_tracker_is_one_of_accelerates(
    idiom: str, bus: Bus, memory: MemorySink
) -> None:
    """`log_with="trainbus"` logs to the bus that it is given, or that listens, once."""
    own = accelerator(log_with="trainbus")
    if idiom != "init_kwargs":
        bus.attach(own)
    given = {} if idiom == "attach" else {"init_kwargs": {"trainbus": {"bus": bus}}}
    own.init_trackers("tiny", {"lr": 0.1}, **given)
    own.log({"loss": 0.5}, step=1)
    own.end_training()
    assert ["run.started", "metrics.logged", "run.ended"] == [event_name(e) for e in memory.events]
    (started,) = of(memory, RunStarted)
    assert ("tiny", 0.1) == (started.project, started.params["lr"])


@pytest.mark.usefixtures("registered")
def test_a_registered_tracker_without_a_bus_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """It logs nothing, hurts nothing, and says what to do."""
    own = accelerator(log_with="trainbus")
    own.init_trackers("tiny", {"lr": 0.1})
    own.log({"loss": 0.5}, step=1)
    own.end_training()
    (line,) = caplog.messages
    assert line.startswith("the tracker 'trainbus' logs nothing, it has no bus: call init_trackers")


def test_one_tracker_in_two_accelerators_has_two_runs() -> None:
    """Each accelerator's values come into its own run, while both are under way."""
    heard = Heard()
    records, shared = heard.records, tracker(heard.bus)
    first, second = accelerator(log_with=shared), accelerator(log_with=shared)
    for own, name in ((first, "first"), (second, "second")):
        own.init_trackers(name)
        own.log({name: 1.0}, step=1)
    first.log({"first": 2.0}, step=2)
    second.log({"second": 2.0}, step=2)
    second.end_training()
    first.end_training()
    names = {r.run: r.event.project for r in records if isinstance(r.event, RunStarted)}
    assert ["first", "second"] == list(names.values())
    for run, project in names.items():
        mine = [record for record in records if record.run == run]
        assert [] == check_grammar(mine)
        values = [record.event.values for record in mine if isinstance(record.event, MetricsLogged)]
        assert [{project: 1.0}, {project: 2.0}] == values
