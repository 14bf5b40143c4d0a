"""The pictures of docs/sinks/html.md: a made-up detection training of 30 epochs, light and dark.

Run as a script, it takes them with Chromium and writes them into docs/images.
"""

from __future__ import annotations

import io
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))

from trainbus.sinks.html import HtmlOptions, HtmlSink  # noqa: E402

import trainbus  # noqa: E402
from support.browser import Browser, chromium  # noqa: E402  found by the line above
from trainbus import RunInfo  # noqa: E402
from trainbus.events import (  # noqa: E402
    AlertRaised,
    Best,
    CheckpointSaved,
    ConfusionMatrixLogged,
    CurveLogged,
    EpochEnded,
    EpochStarted,
    Event,
    ImageLogged,
    MetricsLogged,
    ModelDescribed,
    Record,
    RunEnded,
    RunStarted,
    TableLogged,
    TextLogged,
)

CLASSES = ("pallet", "forklift", "person", "box", "barrel", "cone")
SKILL = (0.93, 0.88, 0.81, 0.9, 0.74, 0.58)
EPOCHS = 30
STEPS = 40
LARGEST = 200_000
BEGUN = 1_767_260_000.0


def training(*, seed: int = 0) -> Iterator[Event]:
    """Yield the events of a detection training that looks like one."""
    rng = np.random.default_rng(seed)
    yield RunStarted(
        name="yolo11n shelf" if not seed else f"yolo11n shelf {seed}",
        project="warehouse",
        task="detect",
        tags=["baseline"],
        framework="ultralytics",
        framework_version="8.4.190",
        params={"epochs": EPOCHS, "batch": 16, "lr0": 0.01 / (1 + seed), "imgsz": 640},
        goals={"metrics/mAP50-95(B)": "max"},
    )
    yield ModelDescribed(parameters=2_590_230, layers=181, gflops=6.4, classes=list(CLASSES))
    for epoch in range(EPOCHS):
        yield EpochStarted(epoch=epoch)
        for step in range(epoch * STEPS + 10, (epoch + 1) * STEPS + 1, 10):
            loss = 0.7 + 2.1 * math.exp(-step / 250) + rng.normal(0, 0.08)
            values = {"train/box_loss": loss}
            yield MetricsLogged(values=values, phase="train", epoch=epoch, step=step)
        yield from _epoch(epoch, rng)
        yield EpochEnded(epoch=epoch, duration_s=41 + rng.normal(0, 1), outcome="completed")
    yield from _evaluation(rng)
    yield AlertRaised(title="training is done", text=f"{EPOCHS} epochs", level="info")
    yield RunEnded(
        status="finished", best=Best(metric="metrics/mAP50-95(B)", value=0.6213, epoch=26)
    )


def _epoch(epoch: int, rng: np.random.Generator) -> Iterator[Event]:
    falling = math.exp(-epoch / 7)
    noise = rng.normal(0, 0.012, 12)
    for phase, rise in (("train", 0.0), ("validation", 0.12)):
        short = "val" if phase == "validation" else phase
        values = {
            f"{short}/{name}": float(low + rise + high * falling + noise[i])
            for i, (name, low, high) in enumerate(
                (("box_loss", 0.7, 1.6), ("cls_loss", 0.4, 2.4), ("dfl_loss", 0.85, 0.7))
            )
        }
        yield MetricsLogged(values=values, phase=phase, epoch=epoch)
    results = {
        f"metrics/{name}(B)": float(top * (1 - falling) + 0.02 + noise[i + 4])
        for i, (name, top) in enumerate(
            (("precision", 0.86), ("recall", 0.8), ("mAP50", 0.84), ("mAP50-95", 0.6))
        )
    }
    yield MetricsLogged(values=results, phase="validation", epoch=epoch)
    yield MetricsLogged(values={"lr/pg0": 0.01 * (1 - epoch / 31)}, phase="train", epoch=epoch)


def _evaluation(rng: np.random.Generator) -> Iterator[Event]:
    x = np.linspace(0, 1, 1000)
    skill = np.array(SKILL)[:, None]
    precision = np.clip(skill * (1 - x**6) + 0.05, 0, 1)
    f1 = np.clip(skill * 4 * (x + 0.05) * (1.02 - x) / (1 + x), 0, 1)
    for title, y, label in (("Precision-Recall(B)", precision, "Precision"), ("F1(B)", f1, "F1")):
        x_label = "Recall" if label == "Precision" else "Confidence"
        yield CurveLogged(
            key=f"curves/{title}", title=title, x=x, y=y, classes=list(CLASSES),
            x_label=x_label, y_label=label, epoch=EPOCHS - 1,
        )  # fmt: skip
    counts = rng.integers(0, 14, (6, 6)) + np.diag((np.array(SKILL) * 220).astype(int))
    yield ConfusionMatrixLogged(
        key="confusion_matrix/counts", matrix=counts, classes=list(CLASSES), epoch=EPOCHS - 1
    )
    columns = ["class", "instances", "precision(B)", "recall(B)", "mAP50(B)", "mAP50-95(B)"]
    rows = [
        [name, int(200 + 9 * i), round(s + 0.03, 3), round(s - 0.04, 3), s, round(s * 0.72, 3)]
        for i, (name, s) in enumerate(zip(CLASSES, SKILL, strict=True))
    ]
    yield TableLogged(key="metrics/per_class", columns=columns, rows=rows, epoch=EPOCHS - 1)
    for epoch in (9, 19, 29):
        pixels = np.zeros((90, 160, 3), dtype=np.uint8)
        pixels[:, :, 1], pixels[10:60, 20:80] = np.linspace(30, 140, 160), (40 + epoch * 6, 90, 60)
        yield ImageLogged(key="val_batch0_pred", array=pixels, epoch=epoch)
    yield CheckpointSaved(
        path="runs/detect/shelf/weights/best.pt", kind="best", epoch=26,
        metrics={"fitness": 0.6213}, final=True,
    )  # fmt: skip
    yield TextLogged(key="command", text="yolo train data=shelf.yaml model=yolo11n.pt epochs=30")
    values = {"metrics/mAP50(B)": 0.8391, "metrics/mAP50-95(B)": 0.6213}
    yield MetricsLogged(values=values, phase="validation", final=True)


def write_page(folder: Path, *, seed: int = 0) -> Path:
    """Return the page of the made-up training, whose records a bus made; an epoch takes 41 s."""
    journal = trainbus.JournalSpec(dir=str(folder / "journal"))
    records: list[Record] = []
    bus = trainbus.Bus(journal=journal, on_receipt=lambda receipt: None)
    bus.subscribe(records.append)
    with bus:
        emit = bus.emitter()
        for event in training(seed=seed):
            emit(event)
    sink = HtmlSink(HtmlOptions(dir=str(folder / "{run}")))
    started = records[0].event
    assert isinstance(started, RunStarted)
    sink.open(RunInfo(id=records[0].run, started=started))
    pace = EPOCHS * 41 / len(records)
    sink.write([msgspec.structs.replace(r, time=BEGUN + pace * r.seq) for r in records])
    sink.close()
    return Path(str(sink.location))


def compressed(picture: bytes) -> bytes:
    """Return a PNG with as many colours as fit into `LARGEST` bytes."""
    from PIL import Image

    for colours in (256, 128, 64):
        file = io.BytesIO()
        image = Image.open(io.BytesIO(picture)).convert("RGB")
        image.quantize(colours, dither=Image.Dither.NONE).save(file, "png", optimize=True)
        if len(file.getvalue()) <= LARGEST:
            break
    return file.getvalue()


def main() -> None:
    """Take the pictures, or say why there are none."""
    if chromium() is None:
        print("no chromium: the pictures of the page stay as they are")
        return
    images = ROOT / "docs" / "images"
    images.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        page = write_page(Path(folder))
        for scheme in ("light", "dark"):
            browser.open(page, "smooth=0.3", dark=scheme == "dark")
            browser.wait("document.querySelectorAll('.metric .main-svg').length >= 6")
            target = images / f"page-{scheme}.png"
            target.write_bytes(compressed(browser.picture()))
            print(f"{target.name}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
