"""Trains a small YOLO on generated shapes, logged to W&B (offline) and to a file."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ultralytics import YOLO

import shapes
import trainbus

CONFIG = Path(__file__).parent.parent / "config" / "wandb-offline.yaml"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = shapes.make_dataset(Path(folder), images=64, val_images=16, size=96)
        model = YOLO("yolo11n.yaml")
        with trainbus.load(CONFIG) as bus:
            bus.attach(model)
            model.train(
                data=str(data),
                project="demo",
                name="shapes",
                epochs=12,
                imgsz=96,
                batch=8,
                nbs=8,
                optimizer="AdamW",
                lr0=0.005,
                warmup_epochs=0,
                mosaic=0.0,
                close_mosaic=0,
                amp=False,
                device="cpu",
            )


if __name__ == "__main__":
    main()
