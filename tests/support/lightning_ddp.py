"""A tiny training by Lightning; as a script, one in two processes on CPU.

    python lightning_ddp.py FOLDER STRATEGY

The folder holds `bus.yaml`. A strategy starts the second process itself: `ddp` by running the
script again, `ddp_spawn` by pickling the trainer, `ddp_fork` by a fork.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from support import torchvision_cpu

torchvision_cpu.install()

import lightning.pytorch as pl  # noqa: E402  needs the line above

QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Steps:
    """What a module needs of a user: a line through noise, logged under three names."""

    save_hyperparameters: Any
    hparams: Any
    log: Any

    def __init__(self, lr: float = 0.1, failing: int | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, 1)

    def _loss(self, batch: Any) -> Any:
        (x,) = batch
        return (self.layer(x).squeeze(1) - x[:, 0]).pow(2).mean()

    def training_step(self, batch: Any, index: int) -> Any:
        """Return the loss, or fail on the rank that was asked to."""
        trainer = getattr(self, "trainer", None)
        rank, step = getattr(trainer, "global_rank", None), getattr(trainer, "global_step", 0)
        if self.hparams.failing is not None and rank == self.hparams.failing and step == 3:
            raise RuntimeError(f"boom on rank {rank}")
        loss = self._loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        """Log the loss."""
        self.log("val_loss", self._loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return SGD, and a schedule that halves its rate every epoch."""
        optimizer = torch.optim.SGD(self.layer.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Tiny(Steps, pl.LightningModule):  # type: ignore[misc]
    """The module for the package `lightning`."""


def data(rows: int = 12) -> Any:
    """Return a loader of batches of four, the same each time."""
    noise = torch.randn(rows, 2, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(noise), batch_size=4)


def main(folder: Path, strategy: str) -> None:
    """Train three epochs of three batches on each of two ranks, then again till rank 1 fails."""
    import trainbus

    with trainbus.load(folder / "bus.yaml") as bus:
        for failing in (None, 1):
            torch.manual_seed(0)
            trainer = pl.Trainer(
                strategy=strategy,
                devices=2,
                max_epochs=3,
                log_every_n_steps=1,
                logger=False,
                callbacks=[pl.callbacks.ModelCheckpoint(folder / "saved", monitor="val_loss")],
                **QUIET,
            )
            bus.attach(trainer)
            trainer.fit(Tiny(failing=failing), data(24), data())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), sys.argv[2])
