"""Pictures of events that a tracker has no object for, and of what users log as a picture.

matplotlib draws curves, matrices and histograms without its global state, so plots of the training
are not affected.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainbus import normalize
from trainbus.errors import MissingPackageError
from trainbus.events import (
    Array,
    ConfusionMatrixLogged,
    CurveLogged,
    HistogramLogged,
    TableLogged,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_INCHES = (8.0, 6.0)
_MAX_CLASSES = 20
_MAX_CELLS = 30
_MAX_ROWS = 40


def drawn(event: Any) -> bytes | None:
    """Return a PNG of a curve, confusion matrix, histogram or table; None for other events.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    match event:
        case CurveLogged():
            draw: Any = _curve
        case ConfusionMatrixLogged():
            draw = _matrix
        case HistogramLogged():
            draw = _histogram
        case TableLogged():
            draw = _table
        case _:
            return None
    figure, axes = _figure()
    draw(axes, event)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    return file.getvalue()


def picture(event: Any) -> tuple[bytes, str]:
    """Return the bytes of an event's picture and the suffix of its file; draw it if it has none.

    Raises:
        MissingPackageError: matplotlib or pillow is not installed.
        OSError: its file can't be read.
        ValueError: the event has no picture.
    """
    path, array = getattr(event, "path", None), getattr(event, "array", None)
    if path is not None:
        return Path(path).read_bytes(), Path(path).suffix
    found = drawn(event) if array is None else png(array)
    if found is None:
        raise ValueError("it has neither a path nor an array")
    return found, ".png"


def png(array: Array) -> bytes:
    """Return an array (H, W) or (H, W, C), uint8, floats in 0…1 or bool, as a PNG.

    Raises:
        MissingPackageError: pillow is not installed.
        ValueError: the array is not a picture.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingPackageError("pillow", extra="pictures") from error
    pixels = np.asarray(array)
    if pixels.dtype.kind == "b":  # a mask
        pixels = pixels.astype(np.uint8) * 255
    if pixels.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            pixels = (np.nan_to_num(np.clip(pixels, 0, 1)) * 255).round()
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim not in (2, 3) or not pixels.size or (pixels.ndim == 3 and pixels.shape[2] > 4):
        raise ValueError(f"expected a picture (H, W) or (H, W, C), found {array.shape}")
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
    return file.getvalue()


def pixels(value: Any) -> Array:
    """Return a figure, a Pillow image, the bytes of a file, or an array as an array of pixels.

    A matplotlib figure, or axes of one, is drawn in its current state. An array or tensor may have
    any device and dtype: (H, W), (H, W, C), or (C, H, W) where only the first axis can be channels.
    Floats in 0…1 and bytes are unchanged. Other values in 0…255 are rounded to bytes; any others
    are scaled to bytes from their minimum to their maximum.

    Raises:
        ValueError: it is not a picture; the message says what to do.
    """
    if (figure := figure_of(value)) is not None:
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi="figure")  # on its own canvas
        value = file.getvalue()
    if isinstance(value, bytes):
        from PIL import Image

        value = Image.open(io.BytesIO(value))
    if is_pillow(value):
        value = _of_pillow(value)
    found = normalize.to_array(value)
    if found is None:
        raise ValueError(f"{_type(value)} is no picture: log a path, an array or a figure")
    while found.ndim > 3 and found.shape[0] == 1:
        found = found[0]
    if found.ndim == 3 and found.shape[2] not in (1, 2, 3, 4) and found.shape[0] in (1, 3, 4):
        found = np.moveaxis(found, 0, 2)
    if found.ndim not in (2, 3) or not found.size or (found.ndim == 3 and found.shape[2] > 4):
        many = "log each picture on its own" if found.ndim > 3 else "expected (H, W) or (H, W, C)"
        raise ValueError(f"an array {found.shape} is no picture: {many}")
    return _in_range(found)


def figure_of(value: Any) -> Figure | None:
    """Return the matplotlib figure that an object is or belongs to, else None."""
    if "matplotlib.figure" not in sys.modules:
        return None
    from matplotlib.figure import Figure

    if isinstance(value, np.ndarray) and value.dtype.kind == "O" and value.size:
        value = value.flat[0]  # of `plt.subplots(2, 2)`
    for found in (value, getattr(value, "figure", None)):
        if isinstance(found, Figure):
            return found
    return None


def is_pillow(value: Any) -> bool:
    """Return whether an object is a Pillow image."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(value, module.Image)


def _of_pillow(image: Any) -> Array:
    if image.mode in ("P", "PA", "LA", "RGBa", "La"):
        image = image.convert("RGBA")
    elif image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBX"):
        image = image.convert("RGB")
    found = np.asarray(image)
    if found.ndim == 3 and found.shape[2] == 4 and (found[:, :, 3] == 255).all():
        return found[:, :, :3]
    return found


def _in_range(found: Array) -> Array:
    """Return pixels as bytes, or as floats in 0…1, which may overshoot a little."""
    if found.dtype == np.uint8:
        return found
    if found.dtype.kind == "b":
        return found.astype(np.uint8) * np.uint8(255)
    values = found.astype(np.float64)
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
    if found.dtype.kind == "f" and low >= -0.2 and high <= 1.2:
        return found if found.dtype.itemsize > 2 else found.astype(np.float32)
    if low < 0 or high > 255:
        values = (values - low) * (255 / (high - low))
    return np.asarray(np.nan_to_num(np.clip(values.round(), 0, 255)).astype(np.uint8))


def _type(value: Any) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")


def _figure() -> tuple[Figure, Axes]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("matplotlib", extra="pictures") from error
    figure = Figure(figsize=_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _curve(axes: Axes, event: CurveLogged) -> None:
    for name, values in list(zip(event.classes, event.y, strict=False))[:_MAX_CLASSES]:
        axes.plot(event.x, values, label=_plain(name), linewidth=1.2)
    if len(event.y) > 1:
        with np.errstate(all="ignore"):
            axes.plot(event.x, np.mean(event.y, axis=0), color="black", label="mean", linewidth=2.5)
    axes.set(
        xlabel=_plain(event.x_label),
        ylabel=_plain(event.y_label),
        title=_plain(event.title or event.key),
    )
    if len(event.y):
        axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def _matrix(axes: Axes, event: ConfusionMatrixLogged) -> None:
    shares = np.asarray(event.matrix, dtype=float)
    axes.imshow(shares, cmap="Blues")
    ticks = range(len(event.classes))
    if len(event.classes) <= _MAX_CELLS:
        names = [_plain(name) for name in event.classes]
        axes.set_xticks(ticks, names, rotation=45, ha="right")
        axes.set_yticks(ticks, names)
        middle = np.nanmax(shares, initial=0.0) / 2
        for (row, column), value in np.ndenumerate(shares):
            text = f"{value:.2f}" if event.normalized else f"{value:g}"
            colour = "white" if value > middle else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true", title=_plain(event.key))


def _histogram(axes: Axes, event: HistogramLogged) -> None:
    axes.stairs(np.asarray(event.counts, dtype=float), np.asarray(event.edges), fill=True)
    axes.set(title=_plain(event.key), ylabel="count")


def _table(axes: Axes, event: TableLogged) -> None:
    axes.axis("off")
    cells = [[_cell(value) for value in row] for row in event.rows[:_MAX_ROWS]]
    if cells and event.columns:
        titles = [_plain(name) for name in event.columns]
        axes.table(cells, colLabels=titles, loc="upper left").auto_set_font_size(True)
    left_out = len(event.rows) - len(cells)
    more = f" ({left_out} more rows)" if left_out > 0 else ""
    axes.set_title(_plain(event.key) + more)


def _cell(value: Any) -> str:
    return _plain(f"{value:.4g}" if isinstance(value, float) else str(value))[:40]


def _plain(text: str) -> str:
    """Return a string without formulas and without characters that matplotlib can't draw."""
    return "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")
