"""The Stable-Baselines3 adapter in real trainings: PPO and DQN with networks of a few weights."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from trainbus.adapters import stable_baselines3 as adapter

import trainbus
from support.feeding import feeding
from support.heard import Heard as Listener
from trainbus.events import (
    Best,
    CheckpointSaved,
    EpochStarted,
    MetricsLogged,
    ModelDescribed,
    RunEnded,
    RunStarted,
)
from trainbus.testing import AdapterConformance, Training, check_grammar
from trainbus.toolkit.adapters import around_of

ROLLOUT = 16


def ppo(seed: int = 0, **options: Any) -> Any:
    """Return a PPO that is not trained; a rollout is 16 timesteps."""
    from stable_baselines3 import PPO

    small = {"n_steps": ROLLOUT, "batch_size": ROLLOUT, "n_epochs": 1, "device": "cpu"}
    small["policy_kwargs"] = {"net_arch": [4]}
    return PPO("MlpPolicy", "CartPole-v1", seed=seed, **(small | options))


def dqn(**options: Any) -> Any:
    """Return a DQN that is not trained; it learns from the eighth timestep on."""
    from stable_baselines3 import DQN

    small = {"learning_starts": 8, "buffer_size": 200, "batch_size": 4, "device": "cpu"}
    small["policy_kwargs"] = {"net_arch": [4]}
    return DQN("MlpPolicy", "CartPole-v1", seed=0, **(small | options))


def weights(model: Any) -> bytes:
    """Return the weights of a policy."""
    return b"".join(w.detach().numpy().tobytes() for w in model.policy.parameters())


def evaluation(**options: Any) -> Any:
    """Return a callback that evaluates every 8 timesteps, on one episode."""
    import gymnasium
    from stable_baselines3.common.callbacks import EvalCallback
    from stable_baselines3.common.monitor import Monitor

    env = Monitor(gymnasium.make("CartPole-v1"))
    env.reset(seed=0)
    usual = {"eval_freq": 8, "n_eval_episodes": 1, "verbose": 0}
    return EvalCallback(env, **(usual | options))


def checkpoints(folder: Path, **options: Any) -> Any:
    """Return a callback that saves after every rollout."""
    from stable_baselines3.common.callbacks import CheckpointCallback

    return CheckpointCallback(**({"save_freq": ROLLOUT, "save_path": str(folder)} | options))


def raising_at(step: int, error: BaseException) -> Callable[..., bool]:
    """Return a callback of the user's that raises at a timestep."""

    def callback(locals_: dict[str, Any], _: dict[str, Any]) -> bool:
        if locals_["self"].num_timesteps == step:
            raise error
        return True

    return callback


class TestConformance(AdapterConformance):
    has_epochs = False
    pickles_with = "cloudpickle"

    def start(self, folder: Path, epochs: int) -> Training:
        return self.set_up(ppo(), folder, ROLLOUT * epochs)

    def set_up(self, model: Any, folder: Path, steps: int, **options: Any) -> Training:
        callbacks: list[Any] = [checkpoints(folder)]

        def fail_at(error: BaseException) -> None:
            from stable_baselines3.common.callbacks import ConvertCallback

            callbacks.append(ConvertCallback(raising_at(ROLLOUT + 4, error)))

        def stop_early() -> None:
            from stable_baselines3.common.callbacks import StopTrainingOnRewardThreshold

            stop = StopTrainingOnRewardThreshold(reward_threshold=0.0)
            callbacks.append(evaluation(callback_on_new_best=stop))

        def resume() -> Training:
            saved = folder / f"rl_model_{ROLLOUT}_steps.zip"
            loaded = type(model).load(saved, env=model.get_env())
            return self.set_up(loaded, folder, steps - ROLLOUT, reset_num_timesteps=False)

        return Training(
            target=model,
            run=lambda: model.learn(steps, callback=callbacks, **options),
            result=lambda: weights(model),
            fail_at=fail_at,
            resume=resume,
            stop_early=stop_early,
        )

    def trace(self, target: Any) -> object:
        return list(vars(target))

    def handles(self, target: Any) -> object:
        return around_of(target, "learn").__self__


class Heard(Listener):
    """What is recorded of algorithms."""

    @property
    def metrics(self) -> list[tuple[int | None, str, set[str]]]:
        """Step, phase and names of everything that was measured."""
        return [(e.step, e.phase, set(e.values)) for e in self.of(MetricsLogged)]

    def value(self, name: str) -> list[tuple[int | None, float]]:
        """Return the steps and values of one metric."""
        return [(e.step, e.values[name]) for e in self.of(MetricsLogged) if name in e.values]


@pytest.fixture
def heard() -> Iterator[Heard]:
    """A bus to attach to, closed at the end."""
    found = Heard()
    with found.bus:
        yield found


@pytest.fixture
def log(tmp_path: Path) -> Iterator[tuple[Any, Callable[[], list[dict[str, Any]]]]]:
    """A logger of SB3's own, and what reads the rows that it wrote."""
    from stable_baselines3.common.logger import configure

    logger = configure(str(tmp_path / "log"), ["json"])

    def rows() -> list[dict[str, Any]]:
        lines = (tmp_path / "log" / "progress.json").read_text().splitlines()
        return [json.loads(line) for line in lines]

    yield logger, rows
    logger.close()


# Metrics ------------------------------------------------------------------------------------------

TRAIN = {
    *("train/approx_kl", "train/clip_fraction", "train/clip_range", "train/entropy_loss"),
    *("train/explained_variance", "train/learning_rate", "train/loss", "train/n_updates"),
    *("train/policy_gradient_loss", "train/value_loss"),
}


def test_on_policy_values_are_those_of_the_frameworks_log(heard: Heard, log: Any) -> None:
    """PPO: every value that SB3 wrote arrives, an update's at the timestep of the update."""
    model = ppo()
    model.set_logger(log[0])
    heard.bus.attach(model)
    model.learn(3 * ROLLOUT)
    rows = log[1]()
    assert 3 == len(rows)
    for name in ("train/loss", "train/value_loss", "train/n_updates"):
        written = [row[name] for row in rows[1:]]
        steps = [step for step, _ in heard.value(name)]
        values = [value for _, value in heard.value(name)]
        assert [16, 32, 48] == steps
        assert written == pytest.approx(values[:2], rel=1e-5)
    assert [(16, 1.0), (32, 2.0), (48, 3.0)] == heard.value("train/n_updates")
    for name in ("rollout/ep_rew_mean", "rollout/ep_len_mean", "time/fps"):
        expected = {row["time/total_timesteps"]: row[name] for row in rows if name in row}
        assert expected == pytest.approx(dict(heard.value(name)), rel=1e-5)
    everything = {name for row in rows for name in row}
    counters = {"time/iterations", "time/time_elapsed", "time/total_timesteps"}
    assert everything - counters == {n for _, _, names in heard.metrics for n in names}
    steps_in_order = [step for step, _, _ in heard.metrics if step is not None]
    assert sorted(steps_in_order) == steps_in_order
    assert {"train"} == {phase for _, phase, _ in heard.metrics}
    assert (48, "train", TRAIN) == heard.metrics[-1]


def test_off_policy_values_are_those_of_the_frameworks_log(heard: Heard, log: Any) -> None:
    """DQN: every value that SB3 wrote arrives, and those of the last update at the end."""
    model = dqn()
    model.set_logger(log[0])
    heard.bus.attach(model)
    model.learn(120, log_interval=2)
    rows = log[1]()
    assert "4 step" == heard.of(RunStarted)[0].params["train_freq"]
    assert len(rows) > 1
    written = [row["train/loss"] for row in rows if "train/loss" in row]
    recorded = heard.value("train/loss")
    assert written == pytest.approx([value for _, value in recorded][: len(written)], rel=1e-5)
    assert len(written) + 1 == len(recorded)
    logged_at = [row["time/total_timesteps"] for row in rows if "train/loss" in row]
    # The last update before an episode ended, of those that come every fourth timestep.
    updated_at = [*((step - 1) // 4 * 4 for step in logged_at), 120]
    for name in ("train/loss", "train/learning_rate", "train/n_updates"):
        assert updated_at == [step for step, _ in heard.value(name)]
    expected = {row["time/total_timesteps"]: row["rollout/ep_rew_mean"] for row in rows}
    assert expected == pytest.approx(dict(heard.value("rollout/ep_rew_mean")), rel=1e-5)
    assert [] == [n for _, _, names in heard.metrics for n in names if n == "time/episodes"]


def test_the_loggers_interval_is_kept(heard: Heard) -> None:
    """With `log_interval=2` values come every second rollout, and once more at the end."""
    model = ppo()
    heard.bus.attach(model)
    model.learn(4 * ROLLOUT, log_interval=2)
    assert [16, 48, 64] == [step for step, _ in heard.value("train/loss")]
    assert [32, 64] == [step for step, _ in heard.value("time/fps")]


def test_evaluations_are_of_phase_validation(heard: Heard) -> None:
    """What `EvalCallback` measures comes at its timestep, and is what the run is ranked by."""
    classify = evaluation()
    model = ppo()
    heard.bus.attach(model)
    model.learn(2 * ROLLOUT, callback=classify)
    validated = [(step, names) for step, phase, names in heard.metrics if phase == "validation"]
    names = {"eval/mean_reward", "eval/mean_ep_length"}
    assert [(8, names), (16, names), (24, names), (32, names)] == validated
    (started,) = heard.of(RunStarted)
    assert {"eval/mean_reward": "max"} == started.goals
    best = max(value for _, value in heard.value("eval/mean_reward"))
    assert Best(metric="eval/mean_reward", value=best) == heard.of(RunEnded)[0].best
    assert classify.best_mean_reward == best


def test_what_the_user_records_arrives(heard: Heard) -> None:
    """Values of the user's come with the others, NaN as NaN; what is no number or excluded not."""

    def record(locals_: dict[str, Any], _: dict[str, Any]) -> bool:
        logger = locals_["self"].logger
        logger.record("mine/nan", float("nan"))
        logger.record("mine/text", "left")
        logger.record("mine/secret", 1.0, exclude=("trainbus", "csv"))
        logger.record("mine/unplotted", 1.0, exclude="tensorboard")
        logger.record_mean("mine/mean", float(locals_["self"].num_timesteps))
        return True

    model = ppo()
    heard.bus.attach(model)
    model.learn(ROLLOUT, callback=record)
    assert [(16, 8.5)] == heard.value("mine/mean")
    assert [(16, 1.0)] == heard.value("mine/unplotted")
    ((step, value),) = heard.value("mine/nan")
    assert 16 == step
    assert value != value
    assert [] == heard.value("mine/text") == heard.value("mine/secret")


def test_a_logger_of_the_users_is_left_as_it_was(heard: Heard, log: Any) -> None:
    """Nothing stays in a logger of the user's, and a later run gets no value of an earlier one."""
    model = ppo()
    model.set_logger(log[0])
    before = list(log[0].output_formats)
    heard.bus.attach(model)
    for _ in range(2):
        model.learn(ROLLOUT)
        assert before == log[0].output_formats
    assert [16, 16] == [step for step, _ in heard.value("train/loss")]
    with pytest.raises(OSError, match="mine"):
        model.learn(ROLLOUT, callback=raising_at(4, OSError("mine")))
    assert before == log[0].output_formats


# Starts and ends ----------------------------------------------------------------------------------


def test_the_start_says_what_is_trained(heard: Heard) -> None:
    """Parameters, environment and size of the model are recorded, and neither state nor objects."""
    import stable_baselines3

    model = ppo(learning_rate=0.01, clip_range=0.3)
    heard.bus.attach(model)
    model.learn(ROLLOUT, tb_log_name="first")
    (started,) = heard.of(RunStarted)
    assert "first" == started.name
    assert "stable_baselines3" == started.framework
    assert stable_baselines3.__version__ == started.framework_version
    assert (1, None, None) == (started.world_size, started.save_dir, started.resumed)
    expected = {
        "algorithm": "PPO",
        "policy": "ActorCriticPolicy",
        "policy_kwargs": {"net_arch": [4]},
        "env": "CartPole-v1",
        "n_envs": 1,
        "n_steps": ROLLOUT,
        "learning_rate": 0.01,
        "clip_range": 0.3,
        "gamma": 0.99,
        "seed": 0,
        "device": "cpu",
        "total_timesteps": ROLLOUT,
    }
    assert expected == {name: started.params[name] for name in expected}
    assert set() == {"num_timesteps", "start_time", "policy_class", "env_"} & set(started.params)
    (described,) = heard.of(ModelDescribed)
    assert sum(w.numel() for w in model.policy.parameters()) == described.parameters
    assert [] == heard.of(EpochStarted)


def test_an_environment_of_the_users_is_named_by_its_class(heard: Heard) -> None:
    """An unregistered environment has no id; the user's schedules are recorded as text."""
    import gymnasium
    import numpy as np
    from stable_baselines3 import PPO

    class Corridor(gymnasium.Env[Any, Any]):  # type: ignore[misc]
        observation_space = gymnasium.spaces.Box(0, 1, (1,))
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
            self.at = 0
            return np.zeros(1, np.float32), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            self.at += 1
            return np.zeros(1, np.float32), 1.0, self.at == 4, False, {}

    model = PPO("MlpPolicy", Corridor(), n_steps=8, batch_size=8, n_epochs=1, device="cpu")
    heard.bus.attach(model)
    model.learn(8)
    assert "Corridor" == heard.of(RunStarted)[0].params["env"]
    assert [(8, 4.0)] == heard.value("rollout/ep_rew_mean")


def early_stops() -> dict[str, Callable[[], Any]]:
    """Return what ends a training early: the reason that is recorded → the callback."""
    from stable_baselines3.common import callbacks as known

    return {
        "early stop: eval/mean_reward reached 1": lambda: evaluation(
            callback_on_new_best=known.StopTrainingOnRewardThreshold(1.0)
        ),
        "early stop: no better eval/mean_reward in 1 evaluations": lambda: evaluation(
            eval_freq=1, callback_after_eval=known.StopTrainingOnNoModelImprovement(0)
        ),
        "early stop: 1 episodes were played": lambda: [known.StopTrainingOnMaxEpisodes(1)],
        "early stop: a callback returned False": lambda: (
            lambda locals_, _: locals_["self"].num_timesteps < 4
        ),
    }


@pytest.mark.parametrize("reason", early_stops())
@pytest.mark.parametrize("make", [ppo, dqn])
def test_an_early_stop_says_by_what(heard: Heard, make: Callable[[], Any], reason: str) -> None:
    """A callback that returns False ends a run as finished, with the rule it had."""
    model = make()
    heard.bus.attach(model)
    model.learn(1000, callback=early_stops()[reason]())
    assert model.num_timesteps < 1000
    (ended,) = heard.of(RunEnded)
    assert ("finished", reason) == (ended.status, ended.reason)
    assert [] == check_grammar(heard.records)


def test_a_stop_in_the_last_rollout_is_recorded(heard: Heard) -> None:
    """Timesteps beyond the total are the rest of a rollout, in which a callback can stop too."""
    model = ppo()
    heard.bus.attach(model)
    model.learn(4, callback=lambda locals_, _: locals_["self"].num_timesteps < 10)
    assert 10 == model.num_timesteps
    assert "early stop: a callback returned False" == heard.of(RunEnded)[0].reason


def test_two_trainings_of_one_model_are_two_runs(heard: Heard) -> None:
    """`learn` from the start is a new run; with `reset_num_timesteps=False` it continues."""
    model = ppo()
    heard.bus.attach(model)
    model.learn(ROLLOUT)
    model.learn(ROLLOUT)
    model.learn(ROLLOUT, reset_num_timesteps=False)
    first, second, third = heard.of(RunStarted)
    assert None is first.resumed is second.resumed
    assert ROLLOUT == third.resumed.step
    starts = [r for r in heard.records if isinstance(r.event, RunStarted)]
    assert starts[0].run != starts[1].run
    assert (starts[1].run, 2) == (starts[2].run, starts[2].attempt)
    assert [16, 16, 32] == [step for step, _ in heard.value("train/loss")]
    assert {None} == {e.reason for e in heard.of(RunEnded)}


def test_an_exception_of_the_users_names_the_best_so_far(heard: Heard) -> None:
    """A failed run keeps the error and the best evaluation, and the exception is the user's."""
    from stable_baselines3.common.callbacks import ConvertCallback

    error = OSError("mine")
    model = ppo()
    heard.bus.attach(model)
    with pytest.raises(OSError, match="mine") as caught:
        model.learn(64, callback=[evaluation(), ConvertCallback(raising_at(20, error))])
    assert error is caught.value
    (ended,) = heard.of(RunEnded)
    assert ("failed", "OSError") == (ended.status, ended.error.type)
    assert "eval/mean_reward" == ended.best.metric
    model.learn(ROLLOUT)
    assert ["failed", "finished"] == [e.status for e in heard.of(RunEnded)]


def test_evaluation_alone_emits_nothing(heard: Heard) -> None:
    """`evaluate_policy` and `predict`, before and after a training, are no training."""
    from stable_baselines3.common.evaluation import evaluate_policy

    model = ppo()
    heard.bus.attach(model)
    evaluate_policy(model, model.get_env(), n_eval_episodes=1)
    assert [] == heard.records
    model.learn(ROLLOUT)
    count = len(heard.records)
    evaluate_policy(model, model.get_env(), n_eval_episodes=1)
    assert count == len(heard.records)


# Checkpoints --------------------------------------------------------------------------------------


def test_checkpoints_are_recorded_once_they_exist(heard: Heard, tmp_path: Path) -> None:
    """Each zip of `CheckpointCallback` and each new best of `EvalCallback` exists when recorded."""
    there: list[bool] = []

    def look(record: Any) -> None:
        there.append(Path(record.event.path).is_file())

    heard.bus.subscribe(look, CheckpointSaved)
    model = ppo()
    heard.bus.attach(model)
    classify = evaluation(best_model_save_path=str(tmp_path / "best"))
    model.learn(48, callback=[checkpoints(tmp_path / "all"), classify])
    assert there
    assert all(there)
    recorded = heard.of(CheckpointSaved)
    periodic = [(Path(e.path).name, e.step, e.final) for e in recorded if e.kind == "periodic"]
    assert [(f"rl_model_{n}_steps.zip", n, True) for n in (16, 32, 48)] == periodic
    *bests, final = [e for e in recorded if e.kind == "best"]
    scores: list[float] = []
    expected = []
    for step, score in heard.value("eval/mean_reward"):
        if score > max(scores, default=float("-inf")):
            expected.append((step, {"eval/mean_reward": score}, False))
        scores.append(score)
    assert expected == [(e.step, e.metrics, e.final) for e in bests]
    assert (str(tmp_path / "best" / "best_model.zip"), True) == (final.path, final.final)
    assert max(scores) == final.metrics["eval/mean_reward"] == heard.of(RunEnded)[0].best.value
    assert str(tmp_path / "all") == heard.of(RunStarted)[0].save_dir


def test_a_callback_that_comes_first_misses_no_checkpoint(heard: Heard, tmp_path: Path) -> None:
    """A `BusCallback` sees what is saved after it, in the last timestep too."""
    ours = adapter.BusCallback(heard.bus)
    ppo().learn(32, callback=[ours, checkpoints(tmp_path)])
    assert [16, 32] == [e.step for e in heard.of(CheckpointSaved)]


@pytest.mark.parametrize("make", [ppo, dqn])
def test_a_saved_model_holds_nothing_of_ours(
    heard: Heard, make: Callable[[], Any], tmp_path: Path
) -> None:
    """An attached model saves what a plain one does, also while it learns, and loads and learns."""
    import zipfile

    data, models = {}, {}
    for name in ("plain", "attached"):
        models[name] = each = make()
        if name == "attached":
            heard.bus.attach(each)
        each.learn(32, callback=checkpoints(tmp_path / name))
        each.save(tmp_path / f"{name}.zip")
        for path in (tmp_path / f"{name}.zip", tmp_path / name / "rl_model_16_steps.zip"):
            with zipfile.ZipFile(path) as file:
                data[name, path.stem] = json.loads(file.read("data")).keys()
    assert data["plain", "plain"] == data["attached", "attached"]
    assert data["plain", "rl_model_16_steps"] == data["attached", "rl_model_16_steps"]
    model = models["attached"]
    assert weights(models["plain"]) == weights(model)
    count = len(heard.records)
    loaded = type(model).load(tmp_path / "attached.zip", env=model.get_env())
    assert "learn" not in vars(loaded)
    loaded.learn(16, reset_num_timesteps=False)
    assert 48 == loaded.num_timesteps
    assert count == len(heard.records)
    model.learn(16)
    assert count < len(heard.records)


def test_a_resumed_training_goes_on_in_its_run(tmp_path: Path) -> None:
    """Loaded from a checkpoint, a model finds its run by the folder, and says at which timestep."""
    from stable_baselines3 import PPO

    first, second = Heard(), Heard()
    with first.bus:
        model = ppo()
        first.bus.attach(model)
        with pytest.raises(KeyboardInterrupt):
            model.learn(48, callback=raise_after_saving(tmp_path))
    assert "stopped" == first.of(RunEnded)[0].status
    with second.bus:
        loaded = PPO.load(tmp_path / "rl_model_16_steps.zip", env=model.get_env())
        second.bus.attach(loaded)
        loaded.learn(32, callback=checkpoints(tmp_path), reset_num_timesteps=False)
    assert first.records[0].run == second.records[0].run
    assert 2 == second.records[0].attempt
    assert 16 == second.of(RunStarted)[0].resumed.step
    assert [32, 48] == [e.step for e in second.of(CheckpointSaved)]
    assert [32, 48] == [step for step, _ in second.value("train/loss")]


def raise_after_saving(folder: Path) -> list[Any]:
    """Return callbacks that save at 16 and are interrupted at 20."""
    from stable_baselines3.common.callbacks import ConvertCallback

    return [checkpoints(folder), ConvertCallback(raising_at(20, KeyboardInterrupt()))]


# Ways to attach -----------------------------------------------------------------------------------


def summary(heard: Heard) -> list[Any]:
    """Return everything recorded except speeds."""
    found: list[Any] = []
    for record in heard.records:
        event = record.event
        if isinstance(event, MetricsLogged):
            found.append((event.step, {k: v for k, v in event.values.items() if k != "time/fps"}))
        elif not isinstance(event, CheckpointSaved):
            found.append(event)
    return found


@pytest.mark.parametrize("form", ["alone", "list", "children"])
def test_the_callback_records_what_attach_records(heard: Heard, form: str) -> None:
    """`BusCallback(bus)` emits what `bus.attach(model)` does, wherever it is passed."""
    from stable_baselines3.common.callbacks import CallbackList

    other = Heard()
    forms: dict[str, Callable[[Any], Any]] = {
        "alone": lambda ours: ours,
        "list": lambda ours: [ours, evaluation()],
        "children": lambda ours: CallbackList([CallbackList([evaluation()]), ours]),
    }
    attached = ppo()
    heard.bus.attach(attached)
    attached.learn(32, callback=None if form == "alone" else evaluation())
    with other.bus:
        model = ppo()
        model.learn(32, callback=forms[form](adapter.BusCallback(other.bus)))
    assert summary(heard) == summary(other)
    assert heard.names == other.names
    assert weights(attached) == weights(model)


def test_an_attached_model_is_not_reported_twice(heard: Heard) -> None:
    """A `BusCallback` in an attached model takes precedence."""
    model = ppo()
    heard.bus.attach(model)
    model.learn(ROLLOUT, callback=adapter.BusCallback(heard.bus))
    assert 1 == len(heard.of(RunStarted)) == len(heard.of(RunEnded))
    assert [16] == [step for step, _ in heard.value("train/loss")]


def test_a_callback_learns_after_a_failure(log: Any) -> None:
    """What a failed `learn` left in the user's logger is not recorded for the next one."""
    from stable_baselines3.common.callbacks import ConvertCallback

    failed, next_one = Heard(), Heard()
    model = ppo()
    model.set_logger(log[0])
    mine = ConvertCallback(raising_at(20, OSError("mine")))
    with pytest.raises(OSError, match="mine"):
        model.learn(48, callback=[adapter.BusCallback(failed.bus), mine])
    count = len(failed.records)
    model.learn(32, callback=adapter.BusCallback(next_one.bus))
    assert count == len(failed.records)
    assert [] == check_grammar(next_one.records)
    failed.bus.close(OSError("mine"))
    assert "failed" == failed.of(RunEnded)[0].status


def test_a_function_is_a_callback_too(heard: Heard) -> None:
    """A function of the user's, given by position, is called at each timestep of its own."""
    called = []

    def callback(locals_: dict[str, Any], _: dict[str, Any]) -> bool:
        called.append(locals_["self"].num_timesteps)
        return True

    model = ppo()
    heard.bus.attach(model)
    model.learn(4, callback)
    assert list(range(1, ROLLOUT + 1)) == called
    assert "finished" == heard.of(RunEnded)[0].status


def test_each_callback_is_prepared_once(heard: Heard) -> None:
    """The user's callbacks are initialised and started once, and before ours."""
    from stable_baselines3.common.callbacks import BaseCallback

    calls = []

    class Mine(BaseCallback):  # type: ignore[misc]
        def _init_callback(self) -> None:
            calls.append("init")

        def _on_training_start(self) -> None:
            calls.append("start")

        def _on_step(self) -> bool:
            return True

        def _on_training_end(self) -> None:
            self.logger.record("mine/last", 1.0)
            calls.append("end")

    model = ppo()
    heard.bus.attach(model)
    model.learn(ROLLOUT, callback=Mine())
    assert ["init", "start", "end"] == calls
    assert [(16, 1.0)] == heard.value("mine/last")


def test_two_buses_get_the_same(heard: Heard) -> None:
    """Two buses on one model each get everything, and detach in any order."""
    other = Heard()
    model = ppo()
    before = list(vars(model))
    first, second = heard.bus.attach(model), other.bus.attach(model)
    model.learn(ROLLOUT)
    assert heard.names == other.names
    first.detach()
    second.detach()
    assert before == [name for name in vars(model) if name in before]
    assert set() == {"learn", "_setup_learn", "_excluded_save_params"} & set(vars(model))


def test_a_copied_model_reports_too(heard: Heard) -> None:
    """A deep copy of an attached model trains by itself and reports, with the original unharmed."""
    model = ppo()
    heard.bus.attach(model)
    copied = copy.deepcopy(model)
    before = weights(model)
    copied.learn(ROLLOUT)
    assert before == weights(model) != weights(copied)
    assert ["finished"] == [e.status for e in heard.of(RunEnded)]
    assert [] == check_grammar(heard.records)


def test_what_does_not_learn_is_refused() -> None:
    """The error says what was found and what to attach."""
    with pytest.raises(trainbus.AttachError, match="found ActorCriticPolicy; attach the model"):
        trainbus.Bus().attach(ppo().policy)


HOOK = """
import warnings
warnings.simplefilter("ignore")
import stable_baselines3.common.base_class as module
from trainbus.adapters import stable_baselines3 as adapter
import trainbus
bus, heard, asked = trainbus.Bus(), [], []
bus.subscribe(heard.append)
init = module.BaseAlgorithm.__init__
def attach(model):
    asked.append(model)
    bus.attach(model)
for _ in range(2):
    adapter.hook(module, attach)
assert init is module.BaseAlgorithm.__init__.__wrapped__
from stable_baselines3 import PPO
class Mine(PPO):
    def learn(self, *args, **kwargs):
        return super().learn(*args, **kwargs)
small = dict(n_steps=8, batch_size=8, n_epochs=1, device="cpu", policy_kwargs={"net_arch": [4]})
for kind in (PPO, Mine):
    model = kind("MlpPolicy", "CartPole-v1", **small)
    model.predict(model.get_env().reset())
    assert not asked and not heard
    signature = kind.learn.__name__, kind.learn.__doc__
    assert model.learn(8) is model
    model.learn(8)
    model.save("model")
    PPO.load("model").predict(model.get_env().reset())
    print(len(asked), [r.event.__struct_config__.tag for r in heard].count("run.started"))
    asked.clear(), heard.clear()
model = PPO("MlpPolicy", "CartPole-v1", **small)
model.learn(8, callback=adapter.BusCallback(bus))
print(len([r for r in heard if r.event.__struct_config__.tag == "run.started"]))
"""


def test_the_hook_attaches_what_learns(tmp_path: Path) -> None:
    """Each model is attached once, when it first learns, also of a class that overrides `learn`."""
    done = subprocess.run(
        [sys.executable, "-c", HOOK], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert 0 == done.returncode, done.stderr
    assert ["1 2", "1 2", "1"] == done.stdout.splitlines()


def test_an_import_loads_no_framework(tmp_path: Path) -> None:
    """The adapter can be imported where the framework is not installed."""
    code = (
        "import sys, trainbus.adapters.stable_baselines3\n"
        "print([m for m in ('stable_baselines3', 'torch', 'gymnasium') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert "[]" == done.stdout.strip(), done.stderr


def test_a_callback_that_goes_to_a_second_bus_stays_with_it() -> None:
    """Closing the first bus does not detach it from the second."""
    first, second = trainbus.Bus(), trainbus.Bus()
    given = adapter.BusCallback(first)
    second.attach(given)
    first.close()
    assert given.report.active
    second.close()
    assert not given.report.active


def test_the_tensorboard_log_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where a sink feeds TensorBoard too, one line says so; the run names what is fed twice."""
    heard = feeding("tensorboard")
    model = ppo(tensorboard_log=str(tmp_path))
    heard.bus.attach(model)
    model.learn(ROLLOUT)
    assert [["tensorboard"]] == [started.own_loggers for started in heard.of(RunStarted)]
    assert [
        "stable_baselines3's own TensorBoardOutputFormat and a sink of trainbus both log to "
        "TensorBoard; remove one of them (leave out tensorboard_log, or the callback)"
    ] == [line for line in caplog.messages if "both log" in line]


def test_a_metric_named_step_is_a_metric(heard: Heard) -> None:
    """As in the framework's own files, and what is logged with it has its timestep."""
    model = ppo()
    heard.bus.attach(model)

    def record(locals_: dict[str, Any], _: dict[str, Any]) -> bool:
        locals_["self"].logger.record("step", 7.0)
        return True

    model.learn(ROLLOUT, callback=record)
    found = [(e.step, e.values["step"]) for e in heard.of(MetricsLogged) if "step" in e.values]
    assert [(ROLLOUT, 7.0)] == found
