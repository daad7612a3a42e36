"""predictor.py and export_model.py as two processes that share a model, against one process."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest
from family_cases import WITH_TOKENIZER, case, random_prefix
from saved import save_prefix, write_lora
from tiny_models import write_tiny_llama
from tiny_runs import ROOT, run_main

from utils.checkpoints.locate import locate
from utils.errors import UserError
from utils.inference.manifest import read_export
from utils.parallel.topology import Layout

Job = tuple[str, list[str]]
FUSED = "--inference_model"
SAMPLED = ("--top_k", 0, "--temperature", 1.5, "--seed", 7)
# grouped keys and values; one group, which two processes read, and a vocabulary that they do not divide; linear
# biases; learned positions
FAMILIES = ("llama", "chatglm2_wide", "bloom_tiny", "gpt2_tiny")


@dataclass
class Home:
    """Models, a LoRA adapter, a prefix and questions of unequal lengths."""

    path: Path

    def model(self, name: str) -> Path:
        return self.path / "llama" if name == "llama" else case(name).folder

    def predict(self, name: str | Path, output: Path, *options: object) -> Job:
        prompt = 30 if Path(name).name in ("gpt2_tiny", "opt_tiny") else 60  # they have 48 and 64 positions
        words: list[object] = [
            *("--model_name_or_path", self.model(name) if isinstance(name, str) else name),
            *("--data_file", self.path / "questions.json", "--output_file", output, "--device", "cpu"),
            *("--dtype", "float32", "--min_length", 10, "--max_new_tokens", 10, "--src_length", prompt),
            *("--max_length", prompt + 14, "--batch_size", 3, *options),
        ]
        return "predictor", [str(word) for word in words]

    def export(self, name: str, output: Path, *options: object) -> Job:
        model = self.model(name)
        words = ["--model_name_or_path", model, "--output_path", output, "--device", "cpu", "--dtype", "float32"]
        return "export_model", [str(word) for word in (*words, *options)]

    def ways(self) -> dict[str, tuple[str, tuple[object, ...]]]:
        """Predictions by name: a model and options."""
        found: dict[str, tuple[str, tuple[object, ...]]] = {}
        for name in FAMILIES:
            found[f"{name}-plain"] = name, ()
            found[f"{name}-fused"] = name, (FUSED,)
        adapted = {"lora": ("--lora_path", self.path / "lora"), "prefix": ("--prefix_path", self.path / "prefix")}
        for kind, options in {"sampled": SAMPLED, **adapted}.items():
            found[f"{kind}-plain"] = "llama", options
            found[f"{kind}-fused"] = "llama", (*options, FUSED)
        found["beams"] = "llama", ("--num_beams", 3, FUSED)
        return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    path = tmp_path_factory.mktemp("shared")
    checkpoint = locate(write_tiny_llama(path / "llama"))
    write_tiny_llama(path / "odd", hidden_size=24, num_attention_heads=3, num_key_value_heads=3)
    write_lora(path / "lora", checkpoint, spread=0.2)  # also of the head, whose rows the processes share
    save_prefix(path / "prefix", random_prefix(checkpoint), checkpoint)
    rows = [{"src": f"Say {'again ' * number}{number}"} for number in range(6)]
    (path / "questions.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Home(path)


def alone(job: Job, expect: int = 0) -> str:
    """A script as one process, in this one; what it printed."""
    result = run_main(job[0], job[1], {"OMP_NUM_THREADS": "1"}, Path(), expect)
    return result.err if expect else result.out


@dataclass
class Together:
    """What a launch of several scripts has done.

    Attributes:
        log: what rank 0 has printed.
        errors: messages by the number of the job.
    """

    log: str
    errors: dict[str, str]


def together(folder: Path, jobs: Sequence[Job], stdin: str = "") -> Together:
    """All jobs as two processes, in one launch."""
    folder.mkdir(exist_ok=True)
    listed = folder / "jobs.json"
    listed.write_text(json.dumps(jobs))
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(folder / "logs")]
    command = [sys.executable, "-u", *launcher, str(ROOT / "tests" / "parallel_jobs" / "scripts.py"), str(listed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, input=stdin, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    logs = [(folder / "logs" / f"workerlog.{rank}").read_text(errors="replace") for rank in (0, 1)]
    assert done.returncode == 0, "\n".join([done.stdout[-2000:], *(log[-4000:] for log in logs)])
    return Together(logs[0], json.loads((folder / "jobs.json.errors").read_text()))


@pytest.fixture(scope="module")
def shared(home: Home) -> Together:
    """All that this module does with two processes, into `home.path`."""
    own = home.path / "own"
    own.mkdir()
    (home.path / "seed").write_text(str(unfinished(home, own / "continued")))
    jobs = [home.predict(name, own / way, *options) for way, (name, options) in home.ways().items()]
    jobs += [
        home.predict("llama", own / "continued", *SAMPLED[:4]),
        ("predictor", ["--model_name_or_path", str(home.path / "odd"), "--data_file", jobs[0][1][3]]),
        home.export("llama", home.path / "exported", FUSED, "--prefix_path", home.path / "prefix"),
        home.predict(home.path / "exported", own / "static", "--mode", "static", FUSED, "--benchmark"),
        chat(home),
    ]
    return together(home.path / "launch", jobs, "Hello\nmore\n/exit\n")


def chat(home: Home) -> Job:
    words = ["--model_name_or_path", home.model("llama"), "--interactive", "--max_new_tokens", 6, "--min_length", 6]
    return "predictor", [*map(str, words), "--device", "cpu"]


def unfinished(home: Home, output: Path) -> int:
    """Leaves the journal of a run that was interrupted after two answers; the seed that it drew."""
    with mock.patch("utils.inference.batch._write", side_effect=UserError("interrupted")):
        said = alone(home.predict("llama", output, *SAMPLED[:4]), expect=2)
    assert said.endswith("error: interrupted\n"), said
    journal = output.with_name(f"{output.name}.partial")
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 7
    journal.write_text("".join(lines[:3]))
    return int(json.loads(lines[0])["facts"]["seed"])


def test_answers_are_those_of_one_process(home: Home, shared: Together) -> None:
    differ = []
    for way, (name, options) in home.ways().items():
        alone(home.predict(name, home.path / way, *options))
        if (home.path / way).read_bytes() != (home.path / "own" / way).read_bytes():
            differ.append(way)
    assert not differ
    answers = {way: (home.path / way).read_bytes() for way in ("llama-fused", "lora-fused", "prefix-fused", "beams")}
    assert len(set(answers.values())) == len(answers)
    assert shared.log.count("answers are in") == len(home.ways()) + 2  # said once for all processes


def test_an_interrupted_run_goes_on(home: Home, shared: Together) -> None:
    assert "continuing after 2 of 6 rows" in shared.log
    output = home.path / "own" / "continued"
    assert not output.with_name("continued.partial").exists()
    seed = (home.path / "seed").read_text()
    alone(home.predict("llama", home.path / "known", *SAMPLED[:4], "--seed", seed))
    assert output.read_bytes() == (home.path / "known").read_bytes()


def test_a_model_whose_heads_do_not_divide(home: Home, shared: Together) -> None:
    (message,) = shared.errors.values()
    assert message == (
        "tensor_parallel_degree 2 (in prediction and export, the number of processes) does not divide both the model's "
        "3 attention heads and the 48 columns of its MLP; 3 would"
    )


def test_a_program_for_each_process(home: Home, shared: Together) -> None:
    folder = home.path / "exported"
    manifest = json.loads((folder / "export.json").read_text())
    assert manifest["degree"] == 2 and manifest["cache"][1] == 1  # of two heads of keys and values
    for rank in (0, 1):
        assert (folder / f"rank_{rank}" / "model.json").is_file()
        assert f"rank_{rank}/prefix_cache.safetensors" in manifest["files"]
    assert not (folder / "model.json").exists() and (folder / "tokenizer.json").is_file()
    assert (home.path / "own" / "static").read_bytes() == (home.path / "own" / "prefix-fused").read_bytes()
    assert "--nproc_per_node 2 predictor.py" in shared.log
    assert shared.log.count("peak memory") == 1


@pytest.mark.parametrize("processes", [1, 3])
def test_an_export_for_another_number_of_processes(home: Home, shared: Together, processes: int) -> None:
    with pytest.raises(UserError) as fault:
        read_export(str(home.path / "exported"), replace(Layout(), world=processes, tensor=processes))
    run = "1 process runs" if processes == 1 else "3 processes run"
    assert f"was exported for 2 processes, but {run}" in str(fault.value)
    assert "--nproc_per_node 2 predictor.py" in str(fault.value)
    start = "-m paddle.distributed.launch --nproc_per_node 3 " if processes == 3 else "export it again: python "
    assert f"{start}export_model.py" in str(fault.value)


def test_the_first_process_chats(home: Home, shared: Together) -> None:
    with mock.patch("sys.stdin", io.StringIO("Hello\nmore\n/exit\n")):
        said = alone(chat(home))
    assert said.count("> ") == 3 and said in shared.log


@pytest.mark.matrix
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_every_family_as_programs(home: Home, tmp_path: Path, fused: bool) -> None:
    options = (FUSED,) if fused else ()
    names = [*WITH_TOKENIZER, "chatglm2_wide"]
    jobs = [
        job
        for name in names
        for job in (
            home.export(name, tmp_path / name, *options),
            home.predict(tmp_path / name, tmp_path / f"{name}.json", "--mode", "static", *options),
        )
    ]
    together(tmp_path / "launch", jobs)
    differ = []
    for name in names:
        alone(home.predict(name, tmp_path / "alone.json", *options))
        if (tmp_path / "alone.json").read_bytes() != (tmp_path / f"{name}.json").read_bytes():
            differ.append(name)
        shutil.rmtree(tmp_path / name)
    assert not differ
