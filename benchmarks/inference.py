"""Speed of this toolchain's four corners against Hugging Face transformers: same weights, same prompts, float32.

    python benchmarks/inference.py [--quick] [--rounds 3] [--long] [--corners dynamic ...]

Corners: dynamic or static graph, each with the plain or the inference model. Every side runs in a process of its
own with the same number of threads, in turn, over several rounds; docs/benchmarks.md says what is measured and how
to read it. Results: benchmarks/results/inference.json and inference.png. The first run makes an environment with
PyTorch for the peer in the toolchain's cache folder.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import inspect
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import inference_report as report
from inference_child import CORNERS

from utils import runtime
from utils.checkpoints.files import cache_root, write_json
from utils.checkpoints.locate import locate
from utils.errors import UserError, notice, run_script
from utils.inference import loading

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
MODEL = "smollm2-135m-instruct"
PEER = report.PEER
PEER_REQUIREMENTS = ("torch==2.13.0", "transformers==4.57.6", "safetensors==0.8.0", "numpy==2.4.6")
PREFILL, NEW_TOKENS, SINGLES, REPEATS, GROWTH_STEPS = 512, 64, 2, 3, 17
CONTEXTS = (512, 1024, 2048, 4096, 8192)
SECONDS = {False: 45.0, True: 20.0}  # expected of one process, full and quick, before one has run
GROWTH_SECONDS = {False: 120.0, True: 20.0}
# Questions of unequal length, whose answers by this model are longer than what is decoded.
QUESTIONS = (
    "Tell me a story about a fox.",
    "Explain in a few sentences why the sky is blue and why sunsets are red.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "List ten things to pack for a week of hiking in the mountains, with a reason for each, and say what to leave out.",
    "How do airplanes fly?",
    "What should somebody who has never cooked before learn first? Describe the steps.",
    "Describe the water cycle for a class of ten-year-olds: where rain comes from, where it goes, how it returns.",
    "Compare cats and dogs as pets.",
)


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the number of rounds and the results' folder filled in.

    Raises:
        UserError: fewer than one round.
    """
    parser = argparse.ArgumentParser(description="Four corners of inference against Hugging Face transformers.")
    parser.add_argument("--rounds", type=int, help="processes of each side, in turn (default 3, with --quick 1)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: one round, few tokens, figures mean little")
    parser.add_argument("--long", action="store_true", help="also seconds per token at contexts of 512 to 8192 tokens")
    parser.add_argument("--corners", nargs="+", choices=CORNERS, default=list(CORNERS), help="what to measure")
    parser.add_argument("--results", type=Path, help="folder of inference.json and inference.png")
    chosen = parser.parse_args(arguments)
    if chosen.rounds is None:
        chosen.rounds = 1 if chosen.quick else 3
    if chosen.rounds < 1:
        raise UserError(f"--rounds {chosen.rounds}: expected 1 or more")
    if chosen.results is None:
        chosen.results = ROOT / "checkpoints" / "benchmark_quick" if chosen.quick else BENCHMARKS / "results"
    return chosen


def missing(corner: str) -> str | None:
    """Why this version cannot run a corner, or None. The only place that allows for corners which are not there."""
    needed = set(CORNERS[corner]) - set(inspect.signature(loading.prepare).parameters)
    if needed:
        return f"utils.inference.loading.prepare has no argument {' or '.join(sorted(needed))}"
    if corner.startswith("static") and not (ROOT / "export_model.py").is_file():
        return "this version has no export_model.py"
    return None


def peer_python() -> Path:
    """The interpreter of the peer's environment, which is made now if it is not there.

    Raises:
        UserError: pip could not install it.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache_root() / "peers" / f"huggingface-python{version}"
    python, marker = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join(PEER_REQUIREMENTS) + "\n"
    with contextlib.suppress(OSError):
        if marker.read_text(encoding="utf-8") == wanted and python.exists():
            return python
    notice(f"installing {', '.join(PEER_REQUIREMENTS)} into {folder} (once; some minutes, 1 to 6 GB)")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *PEER_REQUIREMENTS], check=True)
    except subprocess.CalledProcessError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            "the peer's environment could not be installed; pip's own message above says why. Its settings "
            "(PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf) are used"
        ) from error
    marker.write_text(wanted, encoding="utf-8")
    return python


def make_work(quick: bool) -> dict[str, Any]:
    """What both sides are given: token ids and counts."""
    prepared = loading.prepare(MODEL, device="cpu", dtype="float32")
    rows = (ROOT / "data" / "train.json").read_text(encoding="utf-8").splitlines()
    text = "\n".join(f"{row['src']} {row['tgt']}." for row in map(json.loads, rows))
    ids = prepared.tokenizer.encode(text)
    batch = [
        prepared.template.encode_prompt(prepared.tokenizer, [{"role": "user", "content": question}])
        for question in QUESTIONS
    ]
    return {
        "threads": len(os.sched_getaffinity(0)),
        "first": batch[0],
        "batch": batch,
        "prefill": ids[:PREFILL],
        "text": ids[: CONTEXTS[-1]],
        "new_tokens": 8 if quick else NEW_TOKENS,
        "singles": 1 if quick else SINGLES,
        "repeats": 1 if quick else REPEATS,
        "growth_steps": 3 if quick else GROWTH_STEPS,
        "contexts": [],
    }


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    _, flags = runtime.cpu_flags()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    sets = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
    return {
        "processor": name,
        "instruction_sets": [flag for flag in sets if flag in flags],
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.platform(),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def read_weights(folder: Path) -> int:
    """Bytes of the weights; reading them puts them into the system's file cache, so that no side pays for the disk."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                total += len(block)
    return total


def export(corner: str, folder: Path) -> str:
    """Exports the model for a static corner; returns the exported folder."""
    more = ["--inference_model"] if CORNERS[corner]["inference_model"] else []
    print(f"exporting for {report.LABELS[corner]}", flush=True)
    arguments = ["--model_name_or_path", MODEL, "--output_path", str(folder), *more]
    run_child([sys.executable, str(ROOT / "export_model.py"), *arguments], corner, dict(os.environ))
    return str(folder)


def run_child(command: Sequence[str], side: str, environment: Mapping[str, str]) -> str:
    """Runs a process and returns what it printed.

    Raises:
        UserError: it failed; with the end of what it said.
    """
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = "\n".join(done.stderr.splitlines()[-15:])
        raise UserError(f"{report.LABELS[side]} ended with exit code {done.returncode}; it said:\n{said}")
    return done.stdout


def measure(command: Sequence[str], side: str, work: Path, threads: int) -> dict[str, Any]:
    """One process of one side; its figures, with the cold start on the clock that all processes share."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started = time.monotonic()
    said = run_child([*command, "--work", str(work)], side, environment)
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    found["cold_start"] = found["first_token_at"] - started
    return found


def in_turn(
    sides: Sequence[str], rounds: int, commands: Mapping[str, Sequence[str]], work: Path, expected: float, what: str
) -> dict[str, list[dict[str, Any]]]:
    """Every side once per round; every other round in reverse order, so that no side always goes first."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    threads = json.loads(work.read_text(encoding="utf-8"))["threads"]
    order = [side for turn in range(rounds) for side in (sides if turn % 2 == 0 else reversed(sides))]
    spent: dict[str, float] = {}
    for number, side in enumerate(order):
        usual = statistics.mean(spent.values()) if spent else expected
        left = sum(spent.get(other, usual) for other in order[number:])
        print(f"[{number + 1}/{len(order)}] {what}, {report.LABELS[side]} (about {left:.0f} s left)", flush=True)
        started = time.monotonic()
        found[side].append(measure(commands[side], side, work, threads))
        spent[side] = time.monotonic() - started
    return found


def commit() -> str | None:
    """The commit that was measured, with "+" for uncommitted changes."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    return None


def assemble(
    chosen: argparse.Namespace,
    facts: Mapping[str, Any],
    work: Mapping[str, Any],
    config: Mapping[str, Any],
    found: Mapping[str, Sequence[Mapping[str, Any]]],
    grown: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """The content of inference.json: `facts` known before, and what the processes of each side said."""
    figures = {side: report.summarise(rounds) for side, rounds in found.items()}
    corners = [side for side in found if side != PEER]
    longest = max(map(len, work["batch"])) + work["new_tokens"]
    growth: report.Growth = {}
    for side, rounds in grown.items():
        contexts = list(rounds[0]["growth"])
        growth[side] = {at: report.spread([one["growth"][at] for one in rounds], higher=False) for at in contexts}
    return {
        "model": MODEL,
        "dtype": "float32",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "settings": {
            "rounds": chosen.rounds,
            "quick": chosen.quick,
            "prefill_tokens": len(work["prefill"]),
            "prompt_tokens": [len(prompt) for prompt in work["batch"]],
            **{name: work[name] for name in ("new_tokens", "singles", "repeats", "growth_steps")},
        },
        "machine": facts["machine"],
        "versions": {
            "python": platform.python_version(),
            **{name: version for rounds in found.values() for name, version in rounds[0]["versions"].items()},
        },
        "bytes": {
            "weights": facts["weights"],
            "cache": report.cache_bytes(config, max(len(work["batch"]) * longest, PREFILL + 1)),
            "cache_per_token": report.cache_bytes(config, 1),
        },
        "figures": figures,
        "ratios": {side: report.ratios(figures[side], figures[PEER]) for side in corners},
        "agreement": {side: report.agreement(rounds, found[PEER][0]) for side, rounds in found.items()},
        "growth": growth,
        "not_available": facts["not_available"],
    }


def prepare_commands(corners: Sequence[str], peer: Path, checkpoint: Path, folder: Path) -> dict[str, list[str]]:
    """The command of each side; static corners are exported into `folder`."""
    child, commands = str(BENCHMARKS / "inference_child.py"), {}
    for corner in corners:
        model = export(corner, folder / corner) if corner.startswith("static") else MODEL
        commands[corner] = [sys.executable, child, "--corner", corner, "--model", model]
    commands[PEER] = [str(peer), str(BENCHMARKS / "peers" / "hf_generate.py"), "--model", str(checkpoint)]
    return commands


def write(results: Mapping[str, Any], folder: Path) -> None:
    write_json(folder / "inference.json", results)
    report.draw(results, folder / "inference.png")


def main() -> None:
    chosen = options()
    checkpoint = locate(MODEL)
    refused = {corner: reason for corner in chosen.corners if (reason := missing(corner))}
    for corner, reason in refused.items():
        print(f"{report.LABELS[corner]}: not available ({reason})")
    corners = [corner for corner in chosen.corners if corner not in refused]
    if not corners:
        raise UserError("none of the chosen corners is available")
    python = peer_python()
    work = make_work(chosen.quick)
    facts: dict[str, Any] = {"machine": machine(work["threads"]), "not_available": refused}
    facts["weights"] = read_weights(checkpoint.folder)
    if facts["machine"]["load_average_before"] > 0.5:
        notice(f"other programs are running (load {facts['machine']['load_average_before']}); figures will be too low")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = prepare_commands(corners, python, checkpoint.folder, folder)
        task = folder / "work.json"
        write_json(task, work)
        found = in_turn([*corners, PEER], chosen.rounds, commands, task, SECONDS[chosen.quick], "speed")
        results = assemble(chosen, facts, work, checkpoint.config, found, {})
        write(results, chosen.results)
        if chosen.long:
            growing = [corner for corner in corners if corner.endswith("inference_model")] or corners
            contexts = CONTEXTS[:2] if chosen.quick else CONTEXTS
            write_json(task, {**work, "contexts": contexts})
            expected = GROWTH_SECONDS[chosen.quick]
            grown = in_turn([*growing, PEER], chosen.rounds, commands, task, expected, "growth")
            results = assemble(chosen, facts, work, checkpoint.config, found, grown)
            write(results, chosen.results)
    print("", *report.table(results), "", sep="\n")
    print(f"results are in {chosen.results / 'inference.json'} and inference.png")


if __name__ == "__main__":
    run_script(main)
