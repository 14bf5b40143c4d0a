"""A tiny training by transformers' Trainer; as a script, the one of each process of a torchrun.

python -m torch.distributed.run --nproc_per_node 2 hf_ddp.py FOLDER EPOCHS [RANK THAT FAILS]
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from support import torchvision_cpu

# Read when the Hub's client is imported; nothing is downloaded.
os.environ["HF_HUB_OFFLINE"] = "1"


def samples(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return token sequences that count upwards, which a model soon learns."""
    import torch

    starts = torch.randint(0, 16, (count,), generator=torch.Generator().manual_seed(seed))
    rows = [(torch.arange(8) + start) % 16 for start in starts]
    return [{"input_ids": row, "labels": row} for row in rows]


def make(folder: Path, epochs: float, cls: Any, **arguments: Any) -> Any:
    """Return a trainer of a tiny language model: 16 samples in batches of 4."""
    from transformers import TrainingArguments

    given = {
        "output_dir": str(folder),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 4,
        "logging_steps": 2,
        "learning_rate": 0.01,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    options = {k: arguments.pop(k) for k in ("callbacks", "eval_dataset") if k in arguments}
    return cls(
        args=TrainingArguments(**{**given, **arguments}),
        model_init=model,
        train_dataset=samples(16),
        **{"eval_dataset": samples(4, seed=1), **options},
    )


def model() -> Any:
    """Return a language model of one layer, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=16, num_attention_heads=2, num_key_value_heads=2, **sizes)
    )


def be_rank_1(folder: Path) -> None:
    """Be rank 1 of two gloo processes; the other one is started, and trains for one epoch."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    os.environ |= {"WORLD_SIZE": "2", **where}
    main_rank = subprocess.Popen(
        [sys.executable, __file__, str(folder), "1"],
        env={**os.environ, "RANK": "0", "LOCAL_RANK": "0"},
        stdout=subprocess.DEVNULL,
    )
    atexit.register(main_rank.wait, 60)


def main(folder: Path, epochs: int, failing: int | None) -> None:
    """Train on this rank, and raise on the failing one in its second epoch."""
    torchvision_cpu.install()
    from transformers import Trainer, TrainerCallback

    import trainbus

    class Fail(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.process_index == failing and state.global_step == 3:
                raise ValueError("raised by the user")

    trainer = make(folder / "out", epochs, Trainer, callbacks=[Fail()])
    journal = trainbus.JournalSpec(dir=str(folder / "runs"))
    with trainbus.Bus(journal=journal) as bus:
        bus.attach(trainer)
        trainer.train()


def launch(
    folder: Path, epochs: int, failing: int | None, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Train in two gloo processes of one torchrun, of which one may fail."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    arguments = [str(folder), str(epochs), *([] if failing is None else [str(failing)])]
    return subprocess.run(
        [*command, "--master_port", free_port(), __file__, *arguments],
        env=environment,
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=400,
        check=False,
    )


def free_port() -> str:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
