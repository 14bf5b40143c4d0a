"""A loop of two accelerate processes, for `torch.distributed.run`; rank 1 fails if asked to.

accelerate_ddp.py tracker|attach|no-with [fail]
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from trainbus.adapters.accelerate import BusTracker

import trainbus


def train(bus: trainbus.Bus, idiom: str, *, fails: bool) -> None:
    """Train two steps; what is logged is gathered from both processes."""
    own = Accelerator(log_with=BusTracker(bus) if idiom == "tracker" else None)
    if idiom != "tracker":
        bus.attach(own)
    own.init_trackers("tiny", {"lr": 0.1})
    model = torch.nn.Linear(2, 1)
    model, optimizer = own.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in (1, 2):
        loss = model(torch.ones(4, 2)).square().mean()
        own.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if fails and step == 2 and own.process_index == 1:
            raise ValueError("boom on rank 1")
        total = own.reduce(torch.tensor(float(own.process_index)))
        own.log({"rank": own.process_index, "sum": total}, step=step)
    own.save_state("state")
    own.end_training()


def main() -> None:
    """Train with a bus that is used as README says, or without `with`."""
    idiom, *rest = sys.argv[1:]
    bus = trainbus.load("config.yaml")
    context: Any = nullcontext() if idiom == "no-with" else bus
    with context:
        train(bus, idiom, fails="fail" in rest)


if __name__ == "__main__":
    main()
