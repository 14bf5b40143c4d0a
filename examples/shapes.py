"""Tiny labelled data sets of coloured shapes for the five Ultralytics tasks.

Guarantees: the same arguments produce the same pictures and labels, global random state is not
used, and every label is inside its picture. A class is a colour; the shape is random.
"""

import colorsys
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Points = npt.NDArray[np.float64]

TASKS = ("detect", "segment", "pose", "obb", "classify")
CORNERS = (3, 4, 5, 6, 24)  # 24 corners look round


def make_dataset(
    root: Path,
    task: str = "detect",
    *,
    images: int = 16,
    val_images: int = 8,
    size: int = 160,
    names: Sequence[str] = ("red", "green", "blue"),
    val_names: Sequence[str] | None = None,
    seed: int = 0,
) -> Path:
    """Write a data set to a folder and return what Ultralytics accepts as `data`.

    Args:
        root: Folder to write to; it may exist, but must not contain a data set.
        task: One of `TASKS`.
        images: Number of training pictures; every class occurs if there are at least as many.
        val_images: Number of validation pictures.
        size: Side of the square pictures in pixels.
        names: The classes, by index; their hues are evenly spaced, starting with red.
        val_names: The classes that may occur in validation pictures; None for all.
        seed: Seed of the random generator.

    Returns:
        The path of `data.yaml`, or for "classify" the folder that contains `train` and `val`.

    Raises:
        ValueError: The task is unknown, or `val_names` has a class that is not in `names`.
        FileExistsError: The folder contains a data set.
    """
    val_names = names if val_names is None else val_names
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
    if strangers := sorted(set(val_names) - set(names)):
        raise ValueError(f"val_names has {strangers}, which names lacks; add them to names")
    root = root.resolve()
    splits = [("train", images, names), ("val", val_images, val_names)]
    for number, (split, count, used) in enumerate(splits):
        rng = np.random.default_rng([seed, number])
        classes = _in_turn([names.index(name) for name in used], rng)
        folders = [f"images/{split}", f"labels/{split}"]
        if task == "classify":
            # A class's index is the position of its folder, so an empty class needs a folder too.
            folders = [f"{split}/{name}" for name in names]
        for folder in folders:
            (root / folder).mkdir(parents=True)
        for i in range(count):
            picture, cls, label = _example(task, size, len(names), classes, rng)
            if task == "classify":
                picture.save(root / folders[cls] / f"{i:04}.png")
            else:
                picture.save(root / folders[0] / f"{i:04}.png")
                (root / folders[1] / f"{i:04}.txt").write_text(label, encoding="utf-8")
    return root if task == "classify" else _write_yaml(root, task, names)


def _in_turn(classes: Sequence[int], rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from (int(cls) for cls in rng.permutation(classes))


def _example(
    task: str, size: int, class_count: int, classes: Iterator[int], rng: np.random.Generator
) -> tuple[Image.Image, int, str]:
    """Return a picture, the class of its last shape, and the content of its label file."""
    picture = Image.fromarray(rng.integers(0, 64, (size, size, 3), dtype=np.uint8))
    label = ""
    # A single shape fills the picture, so that even an untrained detector hits some at imgsz=256.
    # Several shapes get a quarter each, so that nothing overlaps and every label is exact.
    count = 1 if task == "classify" else int(rng.integers(1, 4))
    parts = 1 if count == 1 else 2
    for part in rng.permutation(parts**2)[:count]:
        cls = next(classes)
        corner = np.array(divmod(int(part), parts)) * size / parts
        outline, frame = _shape(corner, size / parts, rng)
        colour = tuple(round(255 * n) for n in colorsys.hsv_to_rgb(cls / class_count, 0.9, 0.9))
        points = [(float(x), float(y)) for x, y in outline]
        ImageDraw.Draw(picture).polygon(points, fill=colour, outline="white")
        numbers = _label(task, outline / size, frame / size)
        label += " ".join([str(cls), *(f"{number:.6g}" for number in numbers)]) + "\n"
    return picture, cls, label


def _shape(corner: Points, side: float, rng: np.random.Generator) -> tuple[Points, Points]:
    """Return a random shape's outline and the corners of its rotated box, inside a square."""
    corners = int(rng.choice(CORNERS))
    angles = np.arange(corners) * 2 * np.pi / corners
    outline = np.stack([np.cos(angles), rng.uniform(0.75, 1) * np.sin(angles)], axis=1)
    low, high = outline.min(axis=0), outline.max(axis=0)
    frame = np.array([low, (high[0], low[1]), high, (low[0], high[1])])
    turn = rng.uniform(-0.2, 0.2)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    outline, frame = outline @ rotation, frame @ rotation
    low, extent = frame.min(axis=0), np.ptp(frame, axis=0)
    scale = side * rng.uniform(0.8, 0.97) / extent.max()
    offset = corner + rng.uniform(0, side - extent * scale) - low * scale
    return outline * scale + offset, frame * scale + offset


def _label(task: str, outline: Points, frame: Points) -> list[float]:
    """Return a label's numbers without its class; lengths are fractions of the picture's side."""
    low, high = outline.min(axis=0), outline.max(axis=0)
    centre = (low + high) / 2
    if task == "segment":
        return [*outline.ravel()]
    if task == "obb":
        return [*frame.ravel()]
    box = [*centre, *(high - low)]
    if task == "pose":
        (left, top), (right, bottom) = outline.argmin(axis=0), outline.argmax(axis=0)
        visible = 2
        keypoints = [centre, *outline[[top, right, bottom, left]]]
        return box + [number for x, y in keypoints for number in (x, y, visible)]
    return box


def _write_yaml(root: Path, task: str, names: Sequence[str]) -> Path:
    text = f"path: {json.dumps(str(root))}\ntrain: images/train\nval: images/val\n"
    text += f"names: {json.dumps(list(names))}\n"
    if task == "pose":
        text += "kpt_shape: [5, 3]\nflip_idx: [0, 1, 4, 3, 2]\n"
    (root / "data.yaml").write_text(text, encoding="utf-8")
    return root / "data.yaml"
