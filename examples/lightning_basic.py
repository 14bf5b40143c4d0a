"""Fits a line to noisy points with Lightning, logged with trainbus."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import trainbus


class _Line(pl.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        loss = torch.nn.functional.mse_loss(self.line(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


x = torch.rand(256, 1, generator=torch.manual_seed(0))
data = DataLoader(TensorDataset(x, 3 * x + 1 + 0.1 * torch.randn(256, 1)), batch_size=32)
best = pl.callbacks.ModelCheckpoint("checkpoints", monitor="train_loss_epoch")
trainer = pl.Trainer(max_epochs=5, log_every_n_steps=4, accelerator="cpu", callbacks=[best])
with trainbus.load("config/local.yaml") as bus:
    bus.attach(trainer)
    trainer.fit(_Line(), data)
