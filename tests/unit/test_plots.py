"""Pictures of events that a tracker has no object for."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainbus.events import (
    ConfusionMatrixLogged,
    CurveLogged,
    HistogramLogged,
    ImageLogged,
    TableLogged,
    TextLogged,
)
from trainbus.toolkit.plots import drawn, picture, png

NAMES = [f"class {n}" for n in range(50)]
NASTY = ["$x", "a\0b", "漢字", "", "\u202e", "long " * 20]
EVENTS: dict[str, Any] = {
    "curve": CurveLogged(
        key="k",
        x=np.linspace(0, 1, 5),
        y=np.random.default_rng(0).random((3, 5)),
        classes=NAMES[:3],
    ),
    "one curve": CurveLogged(key="k", x=np.zeros(1), y=np.ones((1, 1)), classes=["a"]),
    "no curve": CurveLogged(key="k", x=np.zeros(0), y=np.zeros((0, 0)), classes=[]),
    "curve of nothing": CurveLogged(
        key="k", x=np.zeros(2), y=np.array([[np.nan, np.inf]]), classes=["a"]
    ),
    "nasty names": CurveLogged(key="$", x=np.arange(2.0), y=np.zeros((6, 2)), classes=NASTY),
    "matrix": ConfusionMatrixLogged(key="k", matrix=np.arange(9).reshape(3, 3), classes=NAMES[:3]),
    "shares": ConfusionMatrixLogged(
        key="k", matrix=np.eye(2) * np.nan, classes=NASTY[:2], normalized=True
    ),
    "large matrix": ConfusionMatrixLogged(key="k", matrix=np.eye(50), classes=NAMES),
    "histogram": HistogramLogged(key="k", counts=np.array([1, 5]), edges=np.arange(3.0)),
    "table": TableLogged(key="k", columns=["a", "$b"], rows=[[1, 0.5], [None, "x"]]),
    "long table": TableLogged(key="k", columns=["a"], rows=[[n] for n in range(500)]),
    "no table": TableLogged(key="k", columns=[], rows=[]),
}


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    """Return a PNG's pixels."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture)


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
@pytest.mark.filterwarnings("ignore:Attempting to set identical:UserWarning")
@pytest.mark.parametrize("name", EVENTS)
def test_an_event_is_drawn(name: str) -> None:
    """A PNG that is not blank, and is the same each time."""
    first, second = drawn(EVENTS[name]), drawn(EVENTS[name])
    assert first is not None
    assert first == second
    assert len(np.unique(pixels(first).reshape(-1, 4), axis=0)) > 1


def test_other_events_are_not_drawn() -> None:
    """There is no picture of them."""
    assert drawn(TextLogged(key="k", text="t")) is None


@pytest.mark.parametrize(
    "array",
    [
        np.full((4, 6), 0.5, np.float32),
        np.full((4, 6, 1), 128, np.uint8),
        np.full((4, 6, 3), 0.5),
        np.full((4, 6, 4), 128, np.uint8),
    ],
)
def test_an_array_becomes_a_png(array: Any) -> None:
    """Grey, RGB and RGBA, as bytes or as floats in 0…1, in the same size."""
    found = pixels(png(array))
    assert (4, 6) == found.shape[:2]
    assert {128} == set(np.unique(found))


def test_floats_are_clipped() -> None:
    """Values outside 0…1, and NaN, are black or white."""
    found = pixels(png(np.array([[-1.0, 2.0, np.nan, np.inf]])))
    assert [0, 255, 0, 255] == found.ravel().tolist()


def test_a_mask_is_black_and_white() -> None:
    """True is white, so that a mask is visible."""
    from PIL import Image

    mask = np.array([[True, False], [False, True]])
    with Image.open(io.BytesIO(png(mask))) as shown:
        assert [255, 0, 0, 255] == np.asarray(shown).ravel().tolist()


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 2, 7), (1, 2, 2, 3)])
def test_an_array_that_is_no_picture_is_rejected(shape: tuple[int, ...]) -> None:
    """The error says what was found and expected."""
    with pytest.raises(ValueError, match=r"expected a picture \(H, W\) or \(H, W, C\), found"):
        png(np.zeros(shape))


def test_plots_of_the_training_are_unaffected() -> None:
    """No figure is left open, and pyplot is not even imported."""
    code = (
        "import sys, numpy as np; from trainbus.toolkit.plots import drawn; "
        "from trainbus.events import CurveLogged; "
        "drawn(CurveLogged(key='k', x=np.arange(2), y=np.zeros((1, 2)), classes=['a'])); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=400, check=True
    )
    assert "False" == done.stdout.strip()


def test_the_picture_of_an_event(tmp_path: Path) -> None:
    """The bytes of a file, or a PNG of an array or curve; other events have none."""
    (tmp_path / "a.jpg").write_bytes(b"jpeg")
    array = np.zeros((2, 2))
    assert (b"jpeg", ".jpg") == picture(ImageLogged(key="k", path=str(tmp_path / "a.jpg")))
    assert (png(array), ".png") == picture(ImageLogged(key="k", array=array))
    assert (drawn(EVENTS["curve"]), ".png") == picture(EVENTS["curve"])
    with pytest.raises(ValueError, match="neither a path nor an array"):
        picture(ImageLogged(key="k"))
    with pytest.raises(FileNotFoundError):
        picture(ImageLogged(key="k", path=str(tmp_path / "none.png")))
