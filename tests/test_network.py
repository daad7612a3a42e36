"""Nothing reaches for a network when no hub name was given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny_models import write_tiny_llama

# Runs before the script: notes every attempt to resolve a name or to connect, and refuses it.
GUARD = """
import os, socket

def refuse(*arguments, **keywords):
    with open(os.environ["NETWORK_ATTEMPTS"], "a") as file:
        file.write(repr(arguments) + "\\n")
    raise OSError("no network in this test")

socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
socket.socket.connect = socket.socket.connect_ex = refuse
"""


def test_training_and_prediction_try_no_connection(root: Path, tmp_path: Path) -> None:
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
    (tmp_path / "model").mkdir()
    model = write_tiny_llama(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = "".join(json.dumps({"src": f"say {n}", "tgt": f"it is {n}"}) + "\n" for n in range(4))
    for split in ("train", "dev"):
        (tmp_path / "data" / f"{split}.json").write_text(rows, encoding="utf-8")
    attempts = tmp_path / "attempts"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "guard"), "NETWORK_ATTEMPTS": str(attempts)}
    lengths = ["--src_length", "64", "--max_length", "128"]
    train = ["finetune_generation.py", "--model_name_or_path", str(model), "--dataset_name_or_path"]
    train += [str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--do_train", "--do_eval", "--lora"]
    train += ["--max_steps", "1", "--eval_with_do_generation", "--eval_max_new_tokens", "4", *lengths]
    predict = ["predictor.py", "--model_name_or_path", str(model), "--lora_path", str(tmp_path / "out"), "--data_file"]
    predict += [str(tmp_path / "data" / "dev.json"), "--output_file", str(tmp_path / "answers.json"), *lengths]
    for words in (train, predict):
        done = subprocess.run([sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert not attempts.exists(), attempts.read_text(encoding="utf-8")

    # the guard works: a hub name is asked of the network, and the failure is one clear error
    words = ["predictor.py", "--model_name_or_path", "someone/some-model", "--interactive"]
    done = subprocess.run([sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert attempts.exists() and "someone/some-model" in done.stderr
