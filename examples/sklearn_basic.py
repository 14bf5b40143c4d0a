"""Trains gradient boosting in scikit-learn, logged with trainbus; each stage is an epoch."""

import numpy as np
from sklearn.ensemble import GradientBoostingRegressor

import trainbus

rng = np.random.default_rng(0)
x = rng.uniform(-2, 2, (400, 3))
y = np.sin(x[:, 0]) + x[:, 1] ** 2 + rng.normal(0, 0.1, 400)

model = GradientBoostingRegressor(n_estimators=20, subsample=0.8, random_state=0)
with trainbus.load("config/local.yaml") as bus:
    bus.attach(model)
    model.fit(x, y)
