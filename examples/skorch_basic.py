"""Trains a skorch net, logged with trainbus: history, checkpoints, best epoch."""

import numpy as np
import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import Checkpoint

import trainbus

torch.manual_seed(0)
rng = np.random.default_rng(0)
x = rng.normal(size=(400, 8)).astype(np.float32)
y = (x[:, 0] * x[:, 1] > 0).astype(np.int64)

net = NeuralNetClassifier(
    torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2)),
    criterion=torch.nn.CrossEntropyLoss,
    max_epochs=5,
    lr=0.1,
    callbacks=[Checkpoint(dirname="checkpoints")],
    verbose=0,
)
with trainbus.load("config/local.yaml") as bus:
    bus.attach(net)
    net.fit(x, y)
