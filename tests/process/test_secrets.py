"""Secrets in parameters and texts reach neither the disk, nor sinks, nor the terminal."""

from __future__ import annotations

import json
import random
import string
import subprocess
import sys
import textwrap
from pathlib import Path

TRAINING = """
    import json, sys
    import trainbus

    params = json.load(open("params.json"))
    with trainbus.load("config.yaml") as bus:
        with bus.run(name="secret", params=params["params"]) as run:
            for number, text in enumerate(params["texts"]):
                run.text(f"text/{number}", text)
            run.alert("title", params["texts"][0])
            raise ValueError(params["texts"][1])
"""


def test_no_secret_is_written_or_shown(tmp_path: Path) -> None:
    """A hundred secrets are in no file of ours and in no output but the user's own."""
    chance = random.Random(3)
    names = ["password", "api_key", "hf_token", "aws_secret_access_key", "dbPassword", "a-secret"]
    letters = string.ascii_letters + string.digits
    secrets = ["".join(chance.choices(letters, k=24)) for _ in range(100)]
    keyed, loose = secrets[:80], secrets[80:]
    params = {
        f"part{n}": {"lr": 0.1, f"x_{names[n % len(names)]}": secret}
        for n, secret in enumerate(keyed)
    }
    texts = [f"curl -H 'Authorization: Bearer {secret}' https://host" for secret in loose]
    (tmp_path / "params.json").write_text(json.dumps({"params": params, "texts": texts}))
    (tmp_path / "config.yaml").write_text(
        "sinks: {kept: {type: jsonl, path: kept.jsonl}, shown: {type: console}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRAINING)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert 1 == done.returncode
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "params.json"]
    assert len(files) > 3
    # Python's own traceback of the user's exception is the user's.
    shown = done.stderr.partition("Traceback")[0] + done.stdout
    written = shown + "".join(path.read_text(errors="replace") for path in files)
    assert [] == [secret for secret in secrets if secret in written]
    assert written.count("[redacted]") >= 100
    assert 80 == len({key for key in params if f'"{key}"' in written})
