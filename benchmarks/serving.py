"""The server under load against llama.cpp's: same weights, same prompts, same number of tokens, same machine.

    python benchmarks/serving.py [--quick] [--rounds 2] [--sides dynamic ...] [--clients 1 4 16 64]

Sides: flask_server.py with the library's model and with the inference model, in float32, and llama-server in float16,
built from the llama-cpp-python source package (the first run; needs CMake and a C++ compiler). All servers live at once
and are measured in turn; the others sleep. Clients are a process of their own; each asks for the next request when it
has its answer. Two mixes: prompts and answers of mixed lengths, and prompts that share one system prompt. Every answer
is greedy and as long as it is asked to be. docs/serving.md says how to read the figures; they are written to
benchmarks/results/serving.json and serving.png.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import serving_mix as mix
import serving_peer as peer
import serving_report as report
from inference import BENCHMARKS, ROOT, commit, machine, read_weights
from inference_sides import end_of

from utils.checkpoints.files import write_json
from utils.checkpoints.locate import locate
from utils.errors import UserError, notice, run_script
from utils.inference.loading import prepare

MODEL = "smollm2-135m-instruct"
SLOTS, CONTEXT = 8, 1536  # answers at a time; tokens of the longest prompt and answer
CLIENTS = (1, 4, 16, 64)
REQUESTS = {1: 5, 4: 12, 16: 24, 64: 64}  # of a measurement
OURS = {"dynamic": [], "inference_model": ["--inference_model"]}
START_SECONDS, END_SECONDS = 180, 30


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the number of rounds and the results' folder filled in."""
    parser = argparse.ArgumentParser(description="The server under load against llama.cpp's.")
    parser.add_argument("--rounds", type=int, help="measurements of each side, in turn (default 2, with --quick 1)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few requests, figures mean little")
    parser.add_argument(
        "--sides", nargs="+", choices=report.LABELS, default=list(report.LABELS), help="what to measure"
    )
    parser.add_argument("--mixes", nargs="+", choices=report.MIXES, default=list(report.MIXES), help="which requests")
    parser.add_argument("--clients", nargs="+", type=int, choices=CLIENTS, help="how many ask at a time (default all)")
    parser.add_argument("--results", type=Path, help="folder of serving.json and serving.png")
    chosen = parser.parse_args(arguments)
    if chosen.rounds is None:
        chosen.rounds = 1 if chosen.quick else 2
    if chosen.rounds < 1:
        raise UserError(f"--rounds {chosen.rounds}: expected 1 or more")
    if chosen.clients is None:
        chosen.clients = [1, 4] if chosen.quick else list(CLIENTS)
    if chosen.results is None:
        chosen.results = ROOT / "checkpoints" / "benchmark_quick" if chosen.quick else BENCHMARKS / "results"
    return chosen


def command(side: str, port: int, threads: int) -> list[str]:
    """What starts the server of a side."""
    if side == report.PEER:
        return peer.command(port, threads, SLOTS, CONTEXT)
    limits = ["--max_batch_size", str(SLOTS), "--dtype", "float32", "--no_ui", "--flask_port", str(port)]
    return [sys.executable, str(ROOT / "flask_server.py"), "--model_name_or_path", MODEL, *limits, *OURS[side]]


@contextlib.contextmanager
def serving(side: str, threads: int) -> Iterator[str]:
    """A running server of a side, which is ended with the block; its address.

    Raises:
        UserError: it did not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command(side, port, threads), cwd=ROOT, env=environment, stdout=said, stderr=said)
        address = f"http://127.0.0.1:{port}"
        try:
            wait(process, address, side, said)
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=END_SECONDS)
            process.kill()
            process.wait()


def wait(process: subprocess.Popen[bytes], address: str, side: str, said: Any) -> None:
    """Until the server is healthy.

    Raises:
        UserError: it ended before, or it takes too long.
    """
    limit = time.monotonic() + START_SECONDS
    while time.monotonic() < limit and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    said.seek(0)
    raise UserError(f"{report.LABELS[side]}: did not start; it said:\n{end_of(said.read().decode(errors='replace'))}")


def measure(address: str, clients: int, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What became of each request when so many clients asked them."""
    work = {"url": f"{address}/v1/completions", "model": MODEL, "clients": clients, "requests": requests}
    load = [sys.executable, str(BENCHMARKS / "serving_load.py")]
    done = subprocess.run(load, input=json.dumps(work), capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the clients ended with exit code {done.returncode}; they said:\n{end_of(done.stderr)}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return [{**one, "max_tokens": asked["max_tokens"]} for one, asked in zip(found, requests, strict=True)]


def in_turn(
    chosen: argparse.Namespace, source: mix.Source, threads: int
) -> dict[tuple[str, int, str], list[report.Cell]]:
    """What every side measured, by mix, clients and side: a list of rounds."""
    found: dict[tuple[str, int, str], list[report.Cell]] = {}
    with contextlib.ExitStack() as stack:
        addresses = {side: stack.enter_context(serving(side, threads)) for side in chosen.sides}
        for address in addresses.values():
            measure(address, 2, mix.requests(source, "mixed", 4, "warm-up"))
        for turn in range(chosen.rounds):
            for name in chosen.mixes:
                for clients in chosen.clients:
                    count = max(clients, REQUESTS[clients] // (2 if chosen.quick else 1))
                    # new prompts each time, or a cache would know them, and the same for all sides
                    asked = mix.requests(source, name, count, f"{name} {clients} {turn}")
                    for side in chosen.sides if turn % 2 == 0 else chosen.sides[::-1]:
                        started = time.monotonic()
                        cell = measure(addresses[side], clients, asked)
                        found.setdefault((name, clients, side), []).append(cell)
                        what = f"round {turn + 1}, {report.MIXES[name]}, {clients} clients, {report.LABELS[side]}"
                        print(f"{what}: {time.monotonic() - started:.1f} s", flush=True)
    return found


def assemble(
    chosen: argparse.Namespace, facts: Mapping[str, Any], found: Mapping[tuple[str, int, str], list[report.Cell]]
) -> dict[str, Any]:
    """The content of serving.json."""
    figures: dict[str, Any] = {}
    for (name, clients, side), rounds in found.items():
        figures.setdefault(name, {}).setdefault(str(clients), {})[side] = report.summary(rounds)
    ours = [side for side in chosen.sides if side != report.PEER] if report.PEER in chosen.sides else []
    return {
        "model": MODEL,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": facts,
        "versions": {"python": platform.python_version(), "llama-cpp-python": peer.VERSION},
        "settings": {
            **{name: getattr(chosen, name) for name in ("rounds", "quick")},
            **{"max_batch_size": SLOTS, "context": CONTEXT, "requests": REQUESTS, "shares": mix.SHARES},
            **{"first_limit": report.FIRST_LIMIT, "next_limit": report.NEXT_LIMIT},
        },
        "figures": figures,
        "ratios": {
            name: {
                clients: {side: report.ratios(sides[side], sides[report.PEER]) for side in ours}
                for clients, sides in by_clients.items()
            }
            for name, by_clients in figures.items()
        },
        "same_texts": {
            side: report.same_texts(
                [cell for key, rounds in found.items() if key[2] == side for cell in rounds],
                [cell for key, rounds in found.items() if key[2] == report.PEER for cell in rounds],
            )
            for side in ours
        },
    }


def main() -> None:
    chosen = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the servers end too
    threads = len(os.sched_getaffinity(0))
    if report.PEER in chosen.sides:
        peer.server()
        peer.weights()
    prepared = prepare(MODEL, device="cpu", dtype="float32")
    read_weights(locate(MODEL).folder)
    facts = machine(threads)
    if facts["load_average_before"] > 0.5:
        notice(f"other programs are running (load {facts['load_average_before']}); figures will be too low")
    found = in_turn(chosen, mix.Source.of(prepared), threads)
    results = assemble(chosen, facts, found)
    write_json(chosen.results / "serving.json", results)
    report.draw(results, chosen.results / "serving.png")
    print("\n".join(report.table(results)))
    print(f"\nwritten: {chosen.results / 'serving.json'} and serving.png")


if __name__ == "__main__":
    run_script(main)
