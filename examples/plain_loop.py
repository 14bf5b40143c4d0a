"""Fits a line to noisy points in a plain loop, logged with trainbus."""

import numpy as np

import trainbus

rng = np.random.default_rng(0)
x = rng.uniform(-1, 1, 256)
y = 3 * x + 1 + rng.normal(0, 0.1, 256)
slope, offset, lr = 0.0, 0.0, 0.3

with trainbus.load("config/local.yaml") as bus, bus.run(name="line", params={"lr": lr}) as run:
    for _ in run.epochs(10):
        error = slope * x + offset - y
        slope -= lr * 2 * float(np.mean(error * x))
        offset -= lr * 2 * float(np.mean(error))
        run.log({"loss": np.mean(error**2), "slope": slope, "offset": offset})
