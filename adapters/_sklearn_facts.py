"""What a fitted estimator of scikit-learn says of itself, by its attributes; nothing is computed.

`own` is always what `vars` gives of the estimator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from trainbus.events import ModelDescribed, Resumed, RunStarted, TableLogged
from trainbus.toolkit.adapters import version

Row: TypeAlias = tuple[str, int | None, dict[str, Any]]
_CURVES = {
    "train_score_": "train",
    "loss_curve_": "train",
    "validation_score_": "validation",
    "validation_scores_": "validation",
}
_NUMBERS = {
    "train": ("n_iter_", "inertia_", "lower_bound_"),
    "validation": ("best_score_", "best_validation_score_", "oob_score_"),
}


def started(target: Any, data: Any, done: int) -> RunStarted:
    """Return the start of a fit.

    Args:
        target: the estimator.
        data: what it is fitted on, of any type.
        done: how many epochs it had before this fit, which goes on from there.
    """
    shape = getattr(data, "shape", None) or ((len(data),) if hasattr(data, "__len__") else ())
    params = {
        "class": f"{type(target).__module__}.{type(target).__qualname__}",
        **dict(zip(("n_samples", "n_features"), shape, strict=False)),
        **target.get_params(),
    }
    return RunStarted(
        task=_task(target),
        params=params,
        framework="sklearn",
        framework_version=version("sklearn"),
        resumed=Resumed(epoch=done - 1) if done else None,
        goals={"best_score_": "max"},
    )


def _task(target: Any) -> str | None:
    from sklearn.utils import get_tags

    try:
        kind = get_tags(target).estimator_type
    except Exception:  # an estimator of the user's that has none
        return None
    return None if kind is None else str(kind)


def rounds(own: Mapping[str, Any]) -> int:
    """Return of how many rounds or epochs an estimator keeps a curve."""
    return max([0, *(len(curve) - _offset(own) for curve in _curves(own).values())])


def rows(own: Mapping[str, Any], done: int) -> Iterator[Row]:
    """Yield phase, epoch and values of the curves; what was before the first round has no epoch.

    Args:
        own: attributes of the estimator.
        done: how many epochs it had before this fit, which are left out.
    """
    offset, count = _offset(own), rounds(own)
    for epoch in range(done or -offset, count) if count else ():
        for phase in ("train", "validation"):
            row = {n: c[epoch + offset] for n, c in _curves(own).items() if _CURVES[n] == phase}
            yield phase, None if epoch < 0 else epoch, row


def _curves(own: Mapping[str, Any]) -> dict[str, Any]:
    return {n: own[n] for n in _CURVES if own.get(n) is not None and len(own[n])}


def _offset(own: Mapping[str, Any]) -> int:
    """Return 1 for histogram boosting, whose curves begin before its first round, else 0."""
    return int("do_early_stopping_" in own)


def results(own: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each phase with the numbers that a fit leaves."""
    for phase, names in _NUMBERS.items():
        yield phase, {name: own[name] for name in names if name in own}


def model_and_table(own: Mapping[str, Any]) -> Iterator[ModelDescribed | TableLogged]:
    """Yield the size of a model that has coefficients, and the table of a search."""
    weights = [own[n] for n in ("coef_", "intercept_", "coefs_", "intercepts_") if n in own]
    parts = [part for w in weights for part in (w if isinstance(w, list) else [w])]
    if parts:
        yield ModelDescribed(parameters=sum(int(getattr(part, "size", 1)) for part in parts))
    if own.get("cv_results_"):
        table = {n: list(v) for n, v in own["cv_results_"].items() if n != "params"}
        lines = [list(line) for line in zip(*table.values(), strict=True)]
        yield TableLogged(key="cv_results_", columns=list(table), rows=lines)


def why_ended(own: Mapping[str, Any]) -> str | None:
    """Return why a fit ended before its last round, where `n_iter_no_change` made it."""
    patience = own.get("n_iter_no_change")
    done, limit = own.get("n_iter_"), own.get("max_iter")
    if "n_estimators_" in own:
        done, limit = own["n_estimators_"], own["n_estimators"]
    is_counted = own.get("do_early_stopping_", own.get("solver") != "lbfgs")
    if patience is None or not is_counted or done is None or limit is None or done >= limit:
        return None
    what = "training loss" if own.get("early_stopping") is False else "validation score"
    return f"early stop: no better {what} in {patience} iterations"


def is_interrupted(own: Mapping[str, Any]) -> bool:
    """Return whether Ctrl-C ended the fit of a neural network, which catches it."""
    misses = own.get("_no_improvement_count")
    if misses is None or own.get("solver") == "lbfgs":
        return False
    return bool(own["n_iter_"] < own["max_iter"] and misses <= own["n_iter_no_change"])
