"""What benchmarks/serving.py makes of its measurements: figures of each side, paired ratios, table, plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from inference_report import Figure

PEER = "llama.cpp"
LABELS = {"dynamic": "dynamic", "inference_model": "inference model", PEER: "llama.cpp, float16"}
COLOURS = dict(zip(LABELS, ("#6baed6", "#2171b5", "#f16913"), strict=True))
MIXES = {"mixed": "mixed lengths", "shared": "one shared system prompt"}
# A request counts towards goodput if its first text came within so many seconds and the others, on average, each
# within so many after the one before: faster than people read.
FIRST_LIMIT, NEXT_LIMIT = 2.0, 0.15

FIGURES = {
    "requests": Figure("requests/s", True, 1, 2),
    "tokens": Figure("tokens/s", True, 1, 1),
    "first_median": Figure("time to first token, median, ms", False, 1000, 0),
    "first_99": Figure("time to first token, 99th percentile, ms", False, 1000, 0),
    "next_median": Figure("between tokens, median, ms", False, 1000, 1),
    "next_99": Figure("between tokens, 99th percentile, ms", False, 1000, 1),
    "goodput": Figure("share of requests within the limits", True, 1, 2),
}
# What became of each request of one measurement, as serving_load.py writes it, with its max_tokens.
Cell = Sequence[Mapping[str, Any]]


def gaps(found: Mapping[str, Any]) -> list[float]:
    """Seconds between one piece of a request's text and the next."""
    return [after - before for before, after in pairwise(found["pieces"])]


def is_good(found: Mapping[str, Any]) -> bool:
    """Whether a request was answered within the limits."""
    if "error" in found or not found["pieces"]:
        return False
    between = gaps(found)
    quick = not between or statistics.fmean(between) <= NEXT_LIMIT
    return quick and found["pieces"][0] - found["sent"] <= FIRST_LIMIT


def figures(cell: Cell) -> dict[str, Any]:
    """The figures of one measurement, and what must be right for them to mean something."""
    answered = [found for found in cell if "error" not in found]
    seconds = max((found["ended"] for found in answered), default=0.0) or float("nan")
    first = [found["pieces"][0] - found["sent"] for found in answered if found["pieces"]] or [float("nan")]
    between = [gap for found in answered for gap in gaps(found)] or [float("nan")]
    usage = [found["usage"] for found in answered if found["usage"]]
    tokens = sum(counts["completion_tokens"] for counts in usage)
    prompts = sum(counts["prompt_tokens"] for counts in usage)
    cached = sum((counts.get("prompt_tokens_details") or {}).get("cached_tokens") or 0 for counts in usage)
    return {
        "requests": len(answered) / seconds,
        "tokens": tokens / seconds,
        "first_median": float(np.median(first)),
        "first_99": float(np.percentile(first, 99)),
        "next_median": float(np.median(between)),
        "next_99": float(np.percentile(between, 99)),
        "goodput": sum(map(is_good, cell)) / len(cell),
        "cached": cached / prompts if prompts else 0.0,
        "errors": [found["error"] for found in cell if "error" in found],
        "wrong_lengths": sum(
            not found["usage"] or found["usage"]["completion_tokens"] != found["max_tokens"] for found in answered
        ),
    }


def summary(rounds: Sequence[Cell]) -> dict[str, Any]:
    """The figures of all rounds: the median over rounds of each, the errors of all."""
    each = [figures(cell) for cell in rounds]
    return {
        **{name: statistics.median(row[name] for row in each) for name in (*FIGURES, "cached")},
        "errors": [error for row in each for error in row["errors"]],
        "wrong_lengths": sum(row["wrong_lengths"] for row in each),
        "rounds": [{name: row[name] for name in FIGURES} for row in each],
    }


def ratios(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """How many times as good as the peer, above 1 is better: the median over pairs of the same round."""
    return {
        name: statistics.median(
            _quotient(a[name], b[name]) if figure.higher else _quotient(b[name], a[name])
            for a, b in zip(ours["rounds"], theirs["rounds"], strict=True)
        )
        for name, figure in FIGURES.items()
    }


def _quotient(above: float, below: float) -> float:
    return above / below if below else (1.0 if not above else float("inf"))


def same_texts(ours: Sequence[Cell], theirs: Sequence[Cell]) -> float:
    """Share of answers that equal the peer's: the same weights, but float32 and float16 part where two tokens tie."""
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
    return sum(a["text"] == b["text"] for a, b in pairs) / len(pairs)


def table(results: Mapping[str, Any]) -> list[str]:
    """All figures for people, a block for each mix and number of clients, and how many times as good as the peer."""
    lines: list[str] = []
    for mix, by_clients in results["figures"].items():
        for clients, sides in by_clients.items():
            lines += ["", f"{MIXES[mix]}, {clients} clients" + "".join(f"{LABELS[side]:>28}" for side in sides)]
            for name, figure in FIGURES.items():
                cells = (_cell(results, mix, clients, side, name) for side in sides)
                lines.append(f"  {figure.title:<42}" + "".join(f"{cell:>22}" for cell in cells))
            for side, found in sides.items():
                for what in found["errors"][:1]:
                    lines.append(f"  {LABELS[side]}: {len(found['errors'])} requests failed, the first with {what}")
                if found["wrong_lengths"]:
                    lines.append(f"  {LABELS[side]}: {found['wrong_lengths']} answers were not as long as asked for")
    for side, share in results["same_texts"].items():
        lines.append(f"{LABELS[side]}: {share:.0%} of the answers equal the peer's, letter by letter")
    return lines


def _cell(results: Mapping[str, Any], mix: str, clients: str, side: str, name: str) -> str:
    figure = FIGURES[name]
    number = f"{results['figures'][mix][clients][side][name] * figure.factor:.{figure.digits}f}"
    ratio = results["ratios"][mix][clients].get(side)
    return number + (f" (x{ratio[name]:.2f})" if ratio else "")


def draw(results: Mapping[str, Any], path: Path) -> None:
    """A row for each mix; a curve for each side over the number of clients."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure as Canvas

    mixes = list(results["figures"])
    canvas = Canvas(figsize=(15, 3.6 * len(mixes) + 0.6), layout="constrained")
    plots: list[tuple[str, Callable[[Any], None]]] = [
        ("tokens", lambda axes: axes.set_ylim(0, None)),
        ("first_median", lambda axes: axes.set_yscale("log")),
        ("next_99", lambda axes: axes.set_ylim(0, None)),
        ("goodput", lambda axes: axes.set_ylim(0, 1.05)),
    ]
    for row, mix in enumerate(mixes):
        for column, (name, finish) in enumerate(plots):
            axes = canvas.add_subplot(len(mixes), len(plots), row * len(plots) + column + 1)
            _curves(axes, results["figures"][mix], name)
            finish(axes)
            axes.set_title(f"{MIXES[mix]}\n{FIGURES[name].title}", fontsize=10)
            if not row and not column:
                axes.legend(frameon=False, fontsize=9)
    machine, settings = results["machine"], results["settings"]
    where = (
        f"{machine['processor']}, {machine['threads']} threads, {results['date'][:10]}, rounds: {settings['rounds']}"
    )
    limits = f"first token {FIRST_LIMIT:g} s, between tokens {NEXT_LIMIT * 1000:g} ms on average"
    title = f"{results['model']}, {settings['max_batch_size']} answers at a time; {where}; limits: {limits}"
    canvas.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=110)


def _curves(axes: Any, by_clients: Mapping[str, Any], name: str) -> None:
    figure, clients = FIGURES[name], list(by_clients)
    for side in next(iter(by_clients.values())):
        heights = [by_clients[number][side][name] * figure.factor for number in clients]
        axes.plot(range(len(clients)), heights, "o-", color=COLOURS[side], label=LABELS[side])
    axes.set_xticks(range(len(clients)), clients)
    axes.set_xlabel("clients", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
