"""Trains a Stable-Baselines3 agent to balance a pole, logged with trainbus."""

import gymnasium
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.monitor import Monitor

import trainbus

eval_env = Monitor(gymnasium.make("CartPole-v1"))
eval_env.reset(seed=0)
callbacks = [
    EvalCallback(eval_env, eval_freq=512, verbose=0),
    CheckpointCallback(save_freq=1024, save_path="checkpoints"),
]
model = PPO("MlpPolicy", "CartPole-v1", n_steps=256, seed=0, device="cpu")
with trainbus.load("config/local.yaml") as bus:
    bus.attach(model)
    model.learn(2048, callback=callbacks)
