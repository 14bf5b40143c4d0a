"""Trains a small YOLO on generated shapes for two epochs, logged with trainbus."""

import tempfile
from pathlib import Path

from ultralytics import YOLO

import shapes
import trainbus

with tempfile.TemporaryDirectory() as folder:
    data = shapes.make_dataset(Path(folder), images=16, size=64)
    model = YOLO("yolo11n.yaml")
    with trainbus.load("config/local.yaml") as bus:
        bus.attach(model)
        model.train(
            data=str(data), project=f"{folder}/runs", epochs=2, imgsz=64, workers=0, device="cpu"
        )
