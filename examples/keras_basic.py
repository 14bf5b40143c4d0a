"""Trains a Keras model to add its inputs, logged with trainbus."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np

import trainbus

keras.utils.set_random_seed(0)
x = np.random.default_rng(0).uniform(-1, 1, (512, 4)).astype("float32")
y = x.sum(axis=1, keepdims=True)
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
model.compile(keras.optimizers.Adam(0.01), loss="mse", metrics=["mae"])
callbacks = [
    keras.callbacks.ModelCheckpoint("checkpoints/best.keras", save_best_only=True),
    keras.callbacks.EarlyStopping(patience=3),
]
with trainbus.load("config/local.yaml") as bus:
    bus.attach(model)
    model.fit(x, y, epochs=10, validation_split=0.25, callbacks=callbacks, verbose=0)
