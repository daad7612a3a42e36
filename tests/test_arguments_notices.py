"""What is said of options that will have no effect in a training script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from utils.arguments import FinetuneArguments, PretrainArguments, parse


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """(words, class, processes) -> the lines that a run says about its options."""
    for name in ("train.json", "dev.json", "text.bin", "text.idx"):
        (tmp_path / name).write_text("")

    def run(words: str, cls: Any = FinetuneArguments, processes: int = 1) -> list[str]:
        monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(processes))
        source = "--input_dir" if cls is PretrainArguments else "--dataset_name_or_path"
        given = ["--model_name_or_path", "m", source, str(tmp_path), "--output_dir", str(tmp_path / "out")]
        parse(cls, [*given, "--device", "cpu", *words.split()], "x.py")
        return capsys.readouterr().err.splitlines()

    return run


def test_training_options_without_do_train_are_told_in_one_line(said: Any) -> None:
    nothing = "note: nothing is trained without do_train (add --do_train true); no effect have "
    options = "--do_eval --max_steps 5 --learning_rate 1e-3"
    assert said(options) == [f"{nothing}max_steps, learning_rate"]
    pretraining = f"{options} --min_learning_rate 1e-4 --continue_training"
    assert said(pretraining, PretrainArguments) == [f"{nothing}max_steps, learning_rate, min_learning_rate"]
    assert said(f"{options} --do_train") == said(f"{options} --do_train false") == said("--do_eval") == []


def test_an_adapter_that_nothing_trained_is_told(said: Any, tmp_path: Path) -> None:
    for name in ("lora_config.json", "lora_model_state.safetensors"):
        (tmp_path / name).write_text("")
    [line] = said("--lora --do_eval")
    assert line.startswith("note: lora true (--lora) without lora_path and do_train: a new adapter, which leaves")
    [line] = said("--prefix_tuning --do_eval --do_train false")
    assert "without prefix_path and do_train: a new prefix, which is random, is evaluated" in line
    assert said("--lora --do_eval --do_train") == said(f"--lora --do_eval --lora_path {tmp_path}") == []


def test_sharding_that_shares_nothing_is_told(said: Any) -> None:
    [line] = said("--do_train --sharding stage2")
    assert line == "note: sharding stage2 (--sharding) has no effect in one process; it takes 2 or more"
    split = "--do_train --sharding stage1 --tensor_parallel_degree 2"
    [line] = said(split, processes=2)
    assert "has no effect in 2 processes, each with its part of the model; it takes 4 or more" in line
    assert said("--do_train --sharding stage2", processes=2) == said(split, processes=4) == []
