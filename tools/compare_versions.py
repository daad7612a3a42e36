"""Runs two versions of this toolchain side by side and says what differs.

    python tools/compare_versions.py --before REVISION                   # all families, about 20 minutes on 2 cores
    python tools/compare_versions.py --before REVISION --families llama gptj --methods sft lora "answers fused"
    python tools/compare_versions.py --before REVISION --methods --layouts TP2 PP2
    python tools/compare_versions.py --before REVISION --speed           # instead; 20 minutes on an idle machine

Any revision that git knows will do; it is compared with the files as they lie here, or with --after REVISION. Both
versions run the real scripts on the same tiny models and rows. Compared are every figure of every step, evaluations,
final weights, generated texts and exported programs; and this version must go on from the checkpoints, adapters,
prefixes and exports of the version before as that version does. The exit code is 1 if anything lies further apart than
--tolerance; with --speed, if a figure of speed or memory is worse by more than 3 %.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("", "tests", "tools", "benchmarks")]

from versions import checks  # noqa: E402
from versions.runs import RunError, Skipped, Slots, Version, checkout  # noqa: E402


@dataclass(frozen=True)
class Cell:
    """What one check of one family found.

    Attributes:
        worst: the largest relative difference; None where there is nothing to compare.
        note: where it was found; why there is nothing to compare.
        failed: a run failed, or does not do what it should.
    """

    family: str
    check: str
    worst: float | None
    note: str
    failed: bool
    compared: int
    seconds: float

    def differs(self, tolerance: float) -> bool:
        return self.failed or (self.worst is not None and not self.worst <= tolerance)

    def shown(self, tolerance: float) -> str:
        if self.worst is None:
            return "❌" if self.failed else "–"
        number = "=" if self.worst == 0 else f"{self.worst:.0e}"
        return f"**{number}**" if self.differs(tolerance) else number


def run_check(bench: checks.Bench, name: str, check: checks.Check) -> Cell:
    started = time.perf_counter()
    worst: float | None = None
    note, failed, compared = "", False, 0
    try:
        found = check(bench)
        worst, note, compared = found.worst, found.where, found.compared
    except Skipped as error:
        note = str(error)
    except (RunError, OSError, ValueError, KeyError) as error:
        note, failed = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}", True
    return Cell(bench.family, name, worst, note, failed, compared, time.perf_counter() - started)


class Report:
    """Tells each cell when it is there, with the rate and what is left, and keeps all of them in a file."""

    def __init__(self, total: int, file: Path, facts: Mapping[str, object], tolerance: float) -> None:
        self.total, self.file, self.facts, self.tolerance = total, file, facts, tolerance
        self.cells: list[Cell] = []
        self.started = time.perf_counter()

    def add(self, cell: Cell) -> None:
        self.cells.append(cell)
        spent, done = time.perf_counter() - self.started, len(self.cells)
        left = spent / done * (self.total - done)
        print(
            f"[{done}/{self.total}] {cell.family}, {cell.check}: {cell.shown(self.tolerance)} ({cell.seconds:.0f} s; "
            f"{60 * done / spent:.1f} checks a minute, about {left / 60:.0f} min left)",
            flush=True,
        )
        if cell.differs(self.tolerance) and cell.note:
            print("    " + cell.note.replace("\n", "\n    "), flush=True)
        content = {**self.facts, "seconds": round(spent), "cells": [asdict(cell) for cell in self.cells]}
        self.file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")

    def table(self) -> str:
        """Markdown: a row for each check, a column for each family."""
        names = list(dict.fromkeys(cell.check for cell in self.cells))
        families = list(dict.fromkeys(cell.family for cell in self.cells))
        found = {(cell.check, cell.family): cell.shown(self.tolerance) for cell in self.cells}
        lines = [f"| | {' | '.join(families)} |", "|---" * (len(families) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(found.get((name, one), '') for one in families)} |" for name in names]
        return "\n".join(lines)


def families_of(before: Path) -> dict[str, Path]:
    """The tiny model of every family that both versions know."""
    from family_cases import WITH_TOKENIZER, case

    known = {case(name).checkpoint.family.name: case(name).folder for name in WITH_TOKENIZER}
    first = {name: known[name] for name in ("llama",) if name in known}
    return {
        name: folder
        for name, folder in (first | known).items()
        if (before / folder.relative_to(ROOT) / "config.json").is_file()
    }


def commit_of(revision: str) -> str:
    """What a revision is called today, with "+" for uncommitted changes where it is the working tree."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*"]
    found = subprocess.run([*git, *([revision] if revision else ["--dirty=+"])], capture_output=True, text=True)
    return found.stdout.strip() or revision


def folders_of(chosen: argparse.Namespace, home: Path) -> dict[str, Path]:
    """Where the files of both versions are, "before" and "after".

    Raises:
        RunError: there is no such revision.
    """
    roots = {"before": home / "before", "after": home / "after" if chosen.after else ROOT}
    checkout(ROOT, chosen.before, roots["before"])
    if chosen.after:
        checkout(ROOT, chosen.after, roots["after"])
    return roots


def facts_of(chosen: argparse.Namespace) -> dict[str, object]:
    return {"before": commit_of(chosen.before), "after": commit_of(chosen.after or ""), "tolerance": chosen.tolerance}


def compare(chosen: argparse.Namespace, roots: Mapping[str, Path], home: Path) -> Report:
    """Runs all checks; the families side by side, each one's checks in turn."""
    checks.write_data(home / "data")
    known = families_of(roots["before"])
    unknown = [name for name in chosen.families or () if name not in known]
    if unknown:
        sys.exit(f"error: --families {' '.join(unknown)}: expected families of both versions: {', '.join(known)}")
    families = {name: known[name] for name in chosen.families or known}
    methods = checks.CHOICES if chosen.methods is None else chosen.methods
    if chosen.layouts is None:
        layouts = list(checks.cover(list(families))) if chosen.methods is None else [[] for _ in families]
    else:
        ways = [method for method in methods if method in checks.GOES_ON] or ["sft", "lora"]
        layouts = [[(layout, way) for layout in chosen.layouts for way in ways]] * len(families)
    plans = {name: checks.checks_of(methods, pairs) for name, pairs in zip(families, layouts, strict=True)}
    report = Report(sum(map(len, plans.values())), chosen.results, facts_of(chosen), chosen.tolerance)
    slots = Slots(chosen.jobs)
    with ExitStack() as stack:
        versions = [
            stack.enter_context(Version(name, root, home / "runs" / name, slots)) for name, root in roots.items()
        ]

        def run_family(name: str) -> None:
            model = home / "models" / name
            shutil.copytree(families[name], model)
            bench = checks.Bench(name, model, home / "data", *versions)
            for check, run in plans[name].items():
                report.add(run_check(bench, check, run))
            if not chosen.keep:
                for version in versions:
                    shutil.rmtree(version.home / name, ignore_errors=True)

        with ThreadPoolExecutor(max(1, chosen.jobs)) as pool:
            list(pool.map(run_family, families))
    return report


def measure(chosen: argparse.Namespace, roots: Mapping[str, Path], home: Path) -> int:
    """Speed and memory in pairs; 1 if a figure is worse than it may be."""
    from versions import speed

    found = speed.compare(roots, chosen.rounds, home / "speed")
    content = json.dumps({**facts_of(chosen), "rounds": chosen.rounds, "times_as_good": found}, indent=1)
    chosen.results.write_text(content + "\n", "utf-8")
    print(f"\n{speed.table(found)}\n\nall are in {chosen.results}")
    return int(any(ratio["median"] < 1 - speed.MAY_BE_WORSE for ratio in found.values()))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, metavar="REVISION", help="the version to compare with")
    parser.add_argument("--after", metavar="REVISION", help="by default the files as they lie here")
    parser.add_argument("--families", nargs="+", help="by default all that both versions know")
    parser.add_argument("--methods", nargs="*", choices=checks.CHOICES, help="in one process; by default all")
    parser.add_argument("--layouts", nargs="*", choices=checks.LAYOUTS, help="of several processes; by default some")
    parser.add_argument("--speed", action="store_true", help="measure speed and memory instead, in pairs")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of each measurement (default 5)")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="relative (default 1e-6)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time (default: the cores)"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "compare_versions.json", help="kept in compare_versions.json"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave what the runs have written in a new folder")
    chosen = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        home = chosen.keep or Path(folder)
        try:
            roots = folders_of(chosen, home)
            if chosen.speed:
                sys.exit(measure(chosen, roots, home))
            report = compare(chosen, roots, home)
        except RunError as error:
            sys.exit(f"error: {error}")
    wrong = [cell for cell in report.cells if cell.differs(chosen.tolerance)]
    print(f"\n{report.table()}\n")
    print(f"= equal, – nothing to compare (both refuse it), ❌ failed, **bold** more than {chosen.tolerance:g} apart")
    for cell in wrong:
        print(f"{cell.family}, {cell.check}: {cell.note}")
    print(f"{len(report.cells) - len(wrong)} of {len(report.cells)} checks agree; all are in {chosen.results}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
