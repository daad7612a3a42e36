"""predictor.py as a user runs it: real processes, a tiny model, and the embedded one."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny_llama

ROWS = [{"src": f"Question number {n}?", "tgt": f"answer {n}"} for n in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


def command(root: Path, *words: str | Path) -> list[str]:
    return [sys.executable, str(root / "predictor.py"), *map(str, words)]


def predict(root: Path, *words: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(root, *words), input=stdin, capture_output=True, text=True, timeout=120, check=False)


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_file_to_file_with_a_broken_row(root: Path, model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "dev.json", [*ROWS[:2], "{broken", ROWS[3]])
    output = tmp_path / "out.json"
    done = predict(
        root, "--model_name_or_path", model, "--data_file", data, "--output_file", output, "--batch_size", 1,
        "--dtype", "float16", "--mode", "dynamic", "--max_new_tokens", 8, "--min_length", 8, "--benchmark",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = read(output)
    assert [row["tgt"] for row in rows] == ["answer 0", "answer 1", None, "answer 3"]
    assert [row["output"] is None for row in rows] == [False, False, True, False]
    assert "dev.json line 3: not valid JSON" in rows[2]["error"] and "line 3" in done.stderr
    assert done.stderr.count("has no float16 arithmetic") == 1
    # real tokens: the prompts' 3 times, and 7 of each answer's 8 by decoding
    figures = dict(line.split("  ", 1) for line in done.stdout.splitlines() if "  " in line)
    assert "(21 tokens)" in figures["decode"] and "tokens/s" in figures["prefill"]
    assert float(figures["load time"].split()[0]) > 0 and "ms" in figures["time to first token"]
    assert int(figures["peak memory"].split()[0]) > 100


def test_beams_and_guesses_from_the_command_line(root: Path, model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "dev.json", [*ROWS[:3], {"src": "very long " * 40}])
    words = ["--model_name_or_path", model, "--data_file", data, "--max_new_tokens", 12, "--src_length", 100]
    outputs = {}
    for name, extra in {
        "greedy": [],
        "guesses": ["--prompt_lookup_num_tokens", 4, "--benchmark"],
        "beams": ["--num_beams", 3, "--length_penalty", 0.5, "--no_repeat_ngram_size", 3],
    }.items():
        done = predict(root, *words, *extra, "--output_file", tmp_path / name)
        assert done.returncode == 0, done.stderr
        outputs[name] = read(tmp_path / name)
        assert outputs[name][3]["note"] == "the prompt was cut to src_length 100 tokens"
        assert "dev.json line 4; their rows have a note" in done.stderr
    assert outputs["greedy"] == outputs["guesses"]
    assert all(row["output"] for row in outputs["beams"]) and outputs["beams"] != outputs["greedy"]


def test_killed_run_continues(root: Path, model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "dev.json", ROWS * 5)
    words = ["--model_name_or_path", model, "--data_file", data, "--batch_size", "2", "--min_length", "24",
             "--max_new_tokens", "24", "--top_k", "0", "--temperature", "1.5"]  # fmt: skip
    output, partial = tmp_path / "out.json", tmp_path / "out.json.partial"
    running = subprocess.Popen(
        command(root, *words, "--output_file", output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not partial.exists() or partial.read_bytes().count(b"\n") < 6:
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not output.exists()
    seed = json.loads(partial.read_text().splitlines()[0])["facts"]["seed"]
    answered = partial.read_text().count("\n") - 1
    done = predict(root, *words, "--output_file", output)
    assert done.returncode == 0, done.stderr
    assert f"continuing after {answered} of 60 rows" in done.stderr
    again = predict(root, *words, "--output_file", tmp_path / "whole.json", "--seed", str(seed))
    assert again.returncode == 0, again.stderr
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not partial.exists()


def test_chat_in_the_terminal(root: Path, model: Path) -> None:
    done = predict(
        root, "--model_name_or_path", model, "--interactive", "--max_new_tokens", 6, "--min_length", 6,
        stdin="Hello\n\n/reset\nHello\nmore\n/exit\nnever read\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "/reset forgets the conversation" in done.stderr
    first, second, third = re.fullmatch(r"> (.*)> > > (.*)> (.*)> ", done.stdout, re.DOTALL).groups()  # type: ignore[union-attr]
    assert first == second and len(first) > 1
    assert third != first


def test_chat_on_a_terminal(root: Path, model: Path) -> None:
    """Bytes that are no text, more of a line than a terminal takes, and Ctrl-C at the prompt, which leaves."""
    mine, theirs = pty.openpty()
    words = ["--model_name_or_path", model, "--interactive", "--max_new_tokens", 2, "--device", "cpu"]
    running = subprocess.Popen(
        command(root, *words), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY),
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    typed = iter([b"caf\xe9\n", b"x" * 5000 + b"\n", b"hello\n", b"\x03"])
    with open(mine, "rb+", buffering=0) as terminal, suppress(OSError):  # it ends with an error on Linux
        while piece := terminal.read(4096):
            for _ in range((shown + piece).count(b"> ") - shown.count(b"> ")):
                terminal.write(next(typed))
            shown += piece
    assert running.wait(timeout=60) == 0, shown
    assert b"this message is no utf-8 text; type it again" in shown
    assert b"the terminal takes no more than 4095 bytes of a line" in shown and b"Traceback" not in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mode", "static"), "holds no exported model"),
        (("--inference_model", "--quant_type", "a8w8"), "low-bit inference is not part of this version yet"),
        (("--model_type", "gpt-3"), "holds a LLaMA v1/v2 model"),
        (("--model_name_or_path", "./nowhere"), "no such folder"),
        (("--lora_path", "."), "lora_config.json"),
        (("--max_length", "4096"), "has 512 positions for prompt and answer together; set it to 512 or less"),
        (("--output_file", "no/such/folder/out.json"), "there is no folder"),
    ],
)
def test_mistakes_are_told_at_once(
    root: Path, model: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    data = write_rows(tmp_path / "dev.json", ROWS)
    before = sorted(os.listdir(tmp_path))
    given = ("--model_name_or_path", model) if "--model_name_or_path" not in words else ()
    output = ("--output_file", tmp_path / "out.json") if "--output_file" not in words else ()
    done = predict(root, *given, "--data_file", data, *output, *words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert sorted(os.listdir(tmp_path)) == before and done.stdout == ""


def test_embedded_model_knows_the_capital_of_france(root: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "dev.json", [{"src": "What is the capital of France?"}])
    output = tmp_path / "out.json"
    done = predict(
        root, "--model_name_or_path", "smollm2-135m-instruct", "--data_file", data, "--output_file", output,
        "--max_new_tokens", 12,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Paris" in read(output)[0]["output"]


def test_embedded_models_answers_do_not_depend_on_the_batch() -> None:
    from utils.inference.loading import load, prepare
    from utils.inference.sampling import SamplingOptions

    prepared = prepare("smollm2-135m-instruct", device="cpu")
    generator = load(prepared, "cpu")
    questions = [
        [{"role": "user", "content": "What is the capital of France?"}],
        [{"role": "user", "content": "Name three fruits that grow on trees in a warm and sunny country."}],
        [
            {"role": "user", "content": "My name is Bob."},
            {"role": "assistant", "content": "Hello Bob!"},
            {"role": "user", "content": "Say my name."},
        ],
    ]
    prompts = [prepared.encode(messages, 200)[0] for messages in questions]  # type: ignore[arg-type]
    for options in (
        SamplingOptions(max_new_tokens=10),
        SamplingOptions(max_new_tokens=10, top_k=50, top_p=0.95, seed=3, repetition_penalty=1.1),
    ):
        alone, together = (generator.generate(prompts, options, batch_size=size) for size in (1, 3))
        assert [answer.tokens for answer in alone] == [answer.tokens for answer in together]
