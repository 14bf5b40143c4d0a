"""Finds the checkpoints and best evaluations of the user's callbacks, which announce neither."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from msgspec.structs import replace

from trainbus.events import Best, CheckpointSaved

from ._stable_baselines3_facts import SCORE


class Checkpoints:
    """What the callbacks of one `learn` save.

    Args:
        callbacks: all of them, before they are called.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback

        self._calls = {c: c.n_calls for c in callbacks if isinstance(c, CheckpointCallback)}
        self._scores = {c: c.best_mean_reward for c in callbacks if isinstance(c, EvalCallback)}
        self._bests: dict[str, CheckpointSaved] = {}
        self.best: Best | None = None
        """The best evaluation that was found so far."""

    def new(self) -> Iterator[CheckpointSaved]:
        """Yield the checkpoints that were written since this was asked last."""
        for saver, calls in self._calls.items():
            if saver.n_calls != calls:
                self._calls[saver] = saver.n_calls
                if saver.n_calls % saver.save_freq:
                    continue
                path = os.path.abspath(saver._checkpoint_path(extension="zip"))
                if os.path.exists(path):
                    step = int(saver.num_timesteps)
                    yield CheckpointSaved(path=path, kind="periodic", step=step, final=True)
        for classify, best in self._scores.items():
            score = float(classify.best_mean_reward)
            if score == best:
                continue
            self._scores[classify] = score
            if self.best is None or score > self.best.value:
                self.best = Best(metric=SCORE, value=score)
            if classify.best_model_save_path is None:
                continue
            path = os.path.abspath(os.path.join(classify.best_model_save_path, "best_model.zip"))
            if os.path.exists(path):
                step = int(classify.num_timesteps)
                saved = CheckpointSaved(path=path, kind="best", step=step, metrics={SCORE: score})
                self._bests[path] = saved
                yield saved

    def final(self) -> list[CheckpointSaved]:
        """Return the best checkpoints once more, as those that nothing overwrites any longer."""
        return [replace(saved, final=True) for saved in self._bests.values()]
