"""Fits a line to noisy points with Accelerate, logged with trainbus."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import trainbus

set_seed(0)
x = torch.rand(256, 1)
data = torch.utils.data.TensorDataset(x, 3 * x + 1 + 0.1 * torch.randn(256, 1))
model = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
accelerator = Accelerator(cpu=True, project_dir="runs/line")

with trainbus.load("config/local.yaml") as bus:
    bus.attach(accelerator)
    accelerator.init_trackers("lines", {"lr": 0.5})
    loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(3):
        for points, target in loader:
            loss = torch.nn.functional.mse_loss(model(points), target)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.log({"loss": loss.item(), "epoch": epoch})
    accelerator.save_state("runs/line/last")
    accelerator.end_training()
