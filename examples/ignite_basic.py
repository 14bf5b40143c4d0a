"""Fits a line to noisy points with PyTorch-Ignite, logged with trainbus."""

import torch
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.metrics import Loss, MeanAbsoluteError, RunningAverage

import trainbus

torch.manual_seed(0)
x = torch.linspace(-1, 1, 256).reshape(32, 8, 1)
data = [(batch, 3 * batch + 1 + 0.1 * torch.randn(8, 1)) for batch in x[torch.randperm(32)]]
train_data, val_data = data[:24], data[24:]

model, mse = torch.nn.Linear(1, 1), torch.nn.MSELoss()
trainer = create_supervised_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), mse)
RunningAverage(output_transform=lambda loss: loss).attach(trainer, "loss")
metrics = {"mse": Loss(mse), "mae": MeanAbsoluteError()}
evaluator = create_supervised_evaluator(model, metrics)
trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(val_data))

with trainbus.load("config/local.yaml") as bus:
    bus.attach(trainer)
    trainer.run(train_data, max_epochs=5)
