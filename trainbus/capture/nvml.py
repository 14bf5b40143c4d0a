"""Reads NVIDIA's GPUs through NVML; a machine without the package or the driver has no GPUs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

logger = logging.getLogger("trainbus")

T = TypeVar("T")


class Nvml:
    """An open connection to NVML. Each value that can't be read is None.

    `handles` has one handle per GPU, in the order of `nvidia-smi`; it is empty without a GPU, a
    driver or the package `nvidia-ml-py`.
    """

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self._library: Any = None
        try:
            with warnings.catch_warnings():  # an older package of this name warns when imported
                warnings.simplefilter("ignore")
                import pynvml
            pynvml.nvmlInit()
        except Exception as error:  # no package, no library, no driver
            logger.debug("no GPUs: %s", error)
            return
        self._library = pynvml
        for index in range(self.read("nvmlDeviceGetCount") or 0):
            handle = self.read("nvmlDeviceGetHandleByIndex", index)
            if handle is not None:  # one GPU can be lost while the others work
                self.handles.append(handle)

    def read(self, name: str, *arguments: Any) -> Any:
        """Return what a function of NVML returns, None if it fails."""
        return self._safely(lambda: getattr(self._library, name)(*arguments))

    def text(self, name: str, *arguments: Any) -> str | None:
        """Return a string from a function of NVML, which is bytes in some versions."""
        found = self.read(name, *arguments)
        return found.decode("utf-8", "replace") if isinstance(found, bytes) else found

    def temperature(self, handle: Any) -> float | None:
        """Return the temperature of a GPU in °C."""
        sensor = getattr(self._library, "NVML_TEMPERATURE_GPU", 0)
        return self.read("nvmlDeviceGetTemperature", handle, sensor)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Close the connection; a second call does nothing."""
        if self._library is not None:
            self.read("nvmlShutdown")
            self.handles, self._library = [], None

    def _safely(self, call: Callable[[], T]) -> T | None:
        try:
            return None if self._library is None else call()
        except Exception:  # not supported by this GPU, no permission, or the driver is gone
            return None
