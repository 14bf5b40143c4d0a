"""Trains a LightGBM classifier on generated data, logged with trainbus."""

import numpy as np
from lightgbm import LGBMClassifier

import trainbus

rng = np.random.default_rng(0)
x = rng.normal(size=(400, 5))
y = (x[:, 0] * x[:, 1] + rng.normal(0, 0.3, 400) > 0).astype(int)

model = LGBMClassifier(n_estimators=20, num_leaves=7, early_stopping_round=5, n_jobs=1, verbose=-1)

with trainbus.load("config/local.yaml") as bus:
    bus.attach(model)
    model.fit(x[:300], y[:300], eval_X=x[300:], eval_y=y[300:])

print(f"accuracy {model.score(x[300:], y[300:]):.2f}")
