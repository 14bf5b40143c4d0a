"""The generated data sets hold what the examples and the trainings of the other tests rely on."""

import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import shapes

LABELLED = ("detect", "segment", "pose", "obb")


def read_labels(data: Path, split: str) -> list[list[float]]:
    lines = [
        line
        for path in sorted((data.parent / "labels" / split).iterdir())
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return [[float(number) for number in line.split()] for line in lines]


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "data.yaml"
    }


@pytest.mark.parametrize("task", LABELLED)
def test_yaml_names_the_classes_and_folders(task: str, tmp_path: Path) -> None:
    """Its path is absolute, and each split has a label file per picture."""
    path = shapes.make_dataset(tmp_path / "données: #1", task, images=5, val_images=3)
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert (str(path.parent), ["red", "green", "blue"]) == (data["path"], data["names"])
    for split, count in (("train", 5), ("val", 3)):
        stems = sorted(file.stem for file in (path.parent / data[split]).glob("*.png"))
        labels = sorted(file.stem for file in (path.parent / "labels" / split).glob("*.txt"))
        assert count == len(stems)
        assert stems == labels
    assert (task == "pose") == ("kpt_shape" in data)


@pytest.mark.parametrize("task", LABELLED)
def test_labels_lie_inside_the_picture(task: str, tmp_path: Path) -> None:
    """Each line is a known class and fractions, as many as the task has."""
    labels = read_labels(shapes.make_dataset(tmp_path, task, images=40), "train")
    assert {0, 1, 2} == {label[0] for label in labels}
    for _, *numbers in labels:
        if task == "pose":
            assert 4 + 5 * 3 == len(numbers)
            assert [2] * 5 == numbers[6::3]
            numbers = [n for n in numbers if n != 2]
        elif task == "segment":
            assert len(numbers) // 2 in shapes.CORNERS
        else:
            assert {"detect": 4, "obb": 8}[task] == len(numbers)
        assert all(0 <= number <= 1 for number in numbers)
        if task in ("detect", "pose"):
            x, y, width, height = numbers[:4]
            assert width / 2 <= min(x, 1 - x) + 1e-5
            assert height / 2 <= min(y, 1 - y) + 1e-5


def test_the_tasks_label_the_same_shapes(tmp_path: Path) -> None:
    """Polygon, keypoints and turned frame agree with the box."""
    box, polygon, pose, frame = (
        read_labels(shapes.make_dataset(tmp_path / task, task), "train") for task in LABELLED
    )
    assert len(box) == len(polygon) == len(pose) == len(frame)
    for (cls, x, y, width, height), (_, *outline), (_, *points), (_, *corners) in zip(
        box, polygon, pose, frame, strict=True
    ):
        left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        xs, ys = outline[::2], outline[1::2]
        assert [left, top, right, bottom] == pytest.approx(
            [min(xs), min(ys), max(xs), max(ys)], abs=1e-5
        )
        keys = np.reshape(points[4:], (5, 3))
        assert [x, y, top, right, bottom, left] == pytest.approx(
            [*keys[0, :2], keys[1, 1], keys[2, 0], keys[3, 1], keys[4, 0]], abs=1e-5
        )
        quad = np.reshape(corners, (4, 2))
        sides = np.roll(quad, -1, axis=0) - quad
        assert 0 == pytest.approx(float(sides[0] @ sides[1]), abs=1e-5)
        assert left >= quad[:, 0].min() - 1e-5
        assert right <= quad[:, 0].max() + 1e-5
        assert cls in (0, 1, 2)


def test_the_middle_of_a_box_has_the_colour_of_its_class(tmp_path: Path) -> None:
    """The picture shows what the label says."""
    shapes.make_dataset(tmp_path, images=12)
    for path in sorted((tmp_path / "labels" / "train").iterdir()):
        with Image.open(tmp_path / "images" / "train" / f"{path.stem}.png") as picture:
            pixels = np.asarray(picture)
        for line in path.read_text(encoding="utf-8").splitlines():
            cls, x, y, *_ = (float(number) for number in line.split())
            assert cls == pixels[math.floor(y * 160), math.floor(x * 160)].argmax()


@pytest.mark.parametrize("task", shapes.TASKS)
def test_the_seed_alone_decides(task: str, tmp_path: Path) -> None:
    """Same seed, same files; another seed, others; the global generator is left alone."""
    np.random.seed(3)
    expected = np.random.RandomState(3).random()
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        shapes.make_dataset(tmp_path / folder, task, images=4, val_images=2, seed=seed)
    assert expected == np.random.random()
    a, b, c = (content(tmp_path / folder) for folder in ("a", "b", "c"))
    assert a == b
    assert a != c


@pytest.mark.parametrize("task", LABELLED)
def test_a_class_can_be_missing_from_validation(task: str, tmp_path: Path) -> None:
    """It is still in the training pictures."""
    path = shapes.make_dataset(tmp_path, task, val_names=["blue", "red"])
    assert {0, 1, 2} == {label[0] for label in read_labels(path, "train")}
    assert {0, 2} == {label[0] for label in read_labels(path, "val")}


def test_classify_has_a_folder_per_class(tmp_path: Path) -> None:
    """A class missing from validation has an empty one, which keeps the other indices right."""
    root = shapes.make_dataset(tmp_path, "classify", images=7, val_names=["red", "blue"])
    counts = {
        split: {folder.name: len(list(folder.iterdir())) for folder in (root / split).iterdir()}
        for split in ("train", "val")
    }
    assert {"red", "green", "blue"} == set(counts["train"])
    assert (7, {2, 3}) == (sum(counts["train"].values()), set(counts["train"].values()))
    assert {"red": 4, "green": 0, "blue": 4} == counts["val"]


@pytest.mark.parametrize("count", [120, 1203])
def test_there_may_be_more_classes_than_shapes(count: int, tmp_path: Path) -> None:
    """No class comes twice before its turn."""
    path = shapes.make_dataset(tmp_path, names=[f"class {i}" for i in range(count)])
    classes = [label[0] for label in read_labels(path, "train")]
    assert len(classes) == len(set(classes))
    assert count == len(yaml.safe_load(path.read_text(encoding="utf-8"))["names"])


def test_an_unknown_task_is_an_error(tmp_path: Path) -> None:
    """The error lists the tasks."""
    with pytest.raises(ValueError, match="unknown task 'track'; expected one of detect, segment"):
        shapes.make_dataset(tmp_path, "track")


def test_a_foreign_validation_class_is_an_error(tmp_path: Path) -> None:
    """The error names the class."""
    with pytest.raises(ValueError, match=r"val_names has \['grey'\], which names lacks"):
        shapes.make_dataset(tmp_path, val_names=["red", "grey"])


def test_a_second_data_set_in_a_folder_is_an_error(tmp_path: Path) -> None:
    """Two data sets would mix."""
    shapes.make_dataset(tmp_path)
    with pytest.raises(FileExistsError):
        shapes.make_dataset(tmp_path)
