"""Trains an XGBoost classifier on generated data, logged with trainbus."""

import numpy as np
from xgboost import XGBClassifier

import trainbus

rng = np.random.default_rng(0)
x = rng.normal(size=(400, 5))
y = (x[:, 0] * x[:, 1] + rng.normal(0, 0.3, 400) > 0).astype(int)

model = XGBClassifier(n_estimators=20, max_depth=3, early_stopping_rounds=5, n_jobs=1)

with trainbus.load("config/local.yaml") as bus:
    bus.attach(model)
    model.fit(x[:300], y[:300], eval_set=[(x[300:], y[300:])], verbose=False)

print(f"accuracy {model.score(x[300:], y[300:]):.2f}")
