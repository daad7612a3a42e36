"""Speed of this toolchain's four corners against Hugging Face transformers: same weights, same prompts, float32.

    python benchmarks/inference.py [--quick] [--rounds 3] [--long] [--corners dynamic ...]

Corners: dynamic or static graph, each with the plain or the inference model. Every side is a process of its own with
the same number of threads; all live at once and are measured in turn, over several rounds; docs/benchmarks.md says
what is measured and how to read it. Results: benchmarks/results/inference.json and inference.png. The first run makes
an environment with PyTorch for the peer in the toolchain's cache folder.
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
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import inference_report as report
from inference_child import CORNERS
from inference_sides import Command, in_turn, libraries_alone, run_child

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
PREFILL, NEW_TOKENS, GROWTH_STEPS = 512, 64, 17
REPEATS = {"prefill": 4, "first_token": 4, "decode_1": 2, "decode_8": 2}  # even: each side goes first in half of them
CONTEXTS = (512, 1024, 2048, 4096, 8192)
# What a process of each kind of side does that imports its libraries and nothing else.
LIBRARIES = {
    report.TOOLCHAIN: "from utils import runtime; runtime.prepare(); runtime.load_paddle()",
    PEER: "import torch, transformers",
}
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
    """What all sides are given: token ids and counts."""
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
        "repeats": dict.fromkeys(REPEATS, 1) if quick else REPEATS,
        "growth_steps": 3 if quick else GROWTH_STEPS,
    }


def speed_plan(repeats: Mapping[str, int]) -> list[Command]:
    """What every process measures: each figure as often as `repeats` says; decoding alone takes the next prompt."""
    plan: list[Command] = [{"measure": "warm_up"}]
    for name, count in repeats.items():
        for repetition in range(count):
            prompt = {"prompt": repetition % len(QUESTIONS)} if name == "decode_1" else {}
            plan.append({"measure": name, **prompt})
    return plan


def growth_plan(contexts: Sequence[int]) -> list[Command]:
    return [{"measure": "warm_up"}, *({"measure": "growth", "context": context} for context in contexts)]


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
    command = [sys.executable, str(ROOT / "export_model.py"), *arguments]
    run_child(command, f"the export for {report.LABELS[corner]}", dict(os.environ))
    return str(folder)


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
    found: Mapping[str, Sequence[report.Round]],
    grown: Mapping[str, Sequence[report.Round]],
) -> dict[str, Any]:
    """The content of inference.json: `facts` known before, and what the processes of each side measured."""
    corners = [side for side in found if side != PEER]
    longest = max(map(len, work["batch"])) + work["new_tokens"]
    contexts = {name: False for name in grown[PEER][0]["values"] if name.isdigit()} if grown else {}
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
            **{name: work[name] for name in ("new_tokens", "repeats", "growth_steps")},
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
            "libraries": facts["libraries"],
        },
        "figures": {side: report.summarise(rounds, report.HIGHER) for side, rounds in found.items()},
        "ratios": {side: report.paired_ratios(found[side], found[PEER], report.HIGHER) for side in corners},
        "against_dynamic": {
            static: report.paired_ratios(found[static], found[dynamic], report.HIGHER)
            for static, dynamic in report.DYNAMIC_OF.items()
            if static in found and dynamic in found
        },
        "agreement": {side: report.agreement(rounds, found[PEER][0]) for side, rounds in found.items()},
        "growth": {side: report.summarise(rounds, contexts) for side, rounds in grown.items()},
        "growth_ratios": {
            side: report.paired_ratios(rounds, grown[PEER], contexts) for side, rounds in grown.items() if side != PEER
        },
        "not_available": facts["not_available"],
    }


def corner_command(corner: str, folder: Path, task: Path) -> list[str]:
    """The command that starts a corner; a static one is exported into `folder`. `task`: the file of the work."""
    model = export(corner, folder / corner) if corner.startswith("static") else MODEL
    child = str(BENCHMARKS / "inference_child.py")
    return [sys.executable, child, "--corner", corner, "--model", model, "--work", str(task)]


def prepare_commands(
    corners: Sequence[str], peer: Path, checkpoint: Path, folder: Path, task: Path
) -> dict[str, list[str]]:
    """The command that starts each side, see `corner_command`."""
    commands = {corner: corner_command(corner, folder, task) for corner in corners}
    loop = str(BENCHMARKS / "peers" / "hf_generate.py")
    commands[PEER] = [str(peer), loop, "--model", str(checkpoint), "--work", str(task)]
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
    interpreters = {report.TOOLCHAIN: sys.executable, PEER: str(python)}
    facts["libraries"] = {
        kind: libraries_alone(interpreters[kind], imports, f"importing the libraries of the {kind} side")
        for kind, imports in LIBRARIES.items()
    }
    environment = {**os.environ, "OMP_NUM_THREADS": str(work["threads"])}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = folder / "work.json"
        write_json(task, work)
        commands = prepare_commands(corners, python, checkpoint.folder, folder, task)
        found = in_turn(commands, chosen.rounds, speed_plan(work["repeats"]), environment)
        results = assemble(chosen, facts, work, checkpoint.config, found, {})
        write(results, chosen.results)
        if chosen.long:
            growing = [corner for corner in corners if corner.endswith("inference_model")] or corners
            plan = growth_plan(CONTEXTS[:2] if chosen.quick else CONTEXTS)
            grown = in_turn({side: commands[side] for side in (*growing, PEER)}, chosen.rounds, plan, environment)
            results = assemble(chosen, facts, work, checkpoint.config, found, grown)
            write(results, chosen.results)
    print("", *report.table(results), "", sep="\n")
    print(f"results are in {chosen.results / 'inference.json'} and inference.png")


if __name__ == "__main__":
    run_script(main)
