"""What benchmarks/inference.py makes of its measurements: best and median, paired ratios, agreement, table, plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PEER, TOOLCHAIN = "huggingface", "toolchain"
LABELS = {
    "dynamic": "dynamic",
    "dynamic_inference_model": "dynamic + inference model",
    "static": "static",
    "static_inference_model": "static + inference model",
    PEER: "Hugging Face",
}
DYNAMIC_OF = {"static": "dynamic", "static_inference_model": "dynamic_inference_model"}  # the same model
COLOURS = dict(zip(LABELS, ("#c6dbef", "#6baed6", "#c7e9c0", "#41ab5d", "#fc9272"), strict=True))


@dataclass(frozen=True)
class Figure:
    """One thing that is measured.

    Attributes:
        title: for people, with the unit.
        higher: whether more is better.
        factor: from the unit of the measurement to that of the title.
        digits: decimals shown.
    """

    title: str
    higher: bool
    factor: float = 1.0
    digits: int = 1


FIGURES = {
    "prefill": Figure("prefill of 512 tokens, tokens/s", True),
    "decode_1": Figure("decoding, batch 1, tokens/s", True),
    "decode_8": Figure("decoding, batch 8, tokens/s", True),
    "first_token": Figure("time to first token, ms", False, 1000, 0),
    "cold_start": Figure("cold start, s", False, 1, 2),
    "peak": Figure("peak memory, MiB", False, 2**-20, 0),
}

HIGHER = {name: figure.higher for name, figure in FIGURES.items()}

# What one process of a side measured: {"values": {figure or context: [one per repetition]}, "answers": {figure: [one
# per repetition: {number of the prompt: tokens}]}, "versions": {...}}
Round = dict[str, Any]
Spread = dict[str, Any]  # {"best": ..., "median": ..., "rounds": [[one per repetition], ...]}
Ratio = dict[str, float]  # {"median": ..., "low": ..., "high": ...}
Growth = dict[str, dict[str, Spread]]  # side -> context -> seconds per token


def spread(rounds: Sequence[Sequence[float]], higher: bool) -> Spread:
    """Best and median of all repetitions of all rounds, and each of them."""
    values = [value for repetitions in rounds for value in repetitions]
    best = max(values) if higher else min(values)
    return {"best": best, "median": statistics.median(values), "rounds": [list(values) for values in rounds]}


def summarise(rounds: Sequence[Round], higher: Mapping[str, bool]) -> dict[str, Spread]:
    """Every figure of one side over its rounds. `higher`: the figures, and whether more is better."""
    return {name: spread([one["values"][name] for one in rounds], up) for name, up in higher.items()}


def advantage(ours: float, theirs: float, higher: bool) -> float:
    """How many times as good as the other side: above 1 is better, whatever the figure."""
    return ours / theirs if higher else theirs / ours


def paired_ratios(ours: Sequence[Round], theirs: Sequence[Round], higher: Mapping[str, bool]) -> dict[str, Ratio]:
    """Of every figure the median of `advantage` over pairs of the same round and repetition, and its extremes.

    The two values of a pair were measured within seconds of each other, so that what the machine does at that time
    slows down both.
    """
    found = {}
    for name, up in higher.items():
        pairs = [
            advantage(mine, other, up)
            for one, another in zip(ours, theirs, strict=True)
            for mine, other in zip(one["values"][name], another["values"][name], strict=True)
        ]
        kinds = {"median": statistics.median(pairs), "low": min(pairs), "high": max(pairs)}
        found[name] = {kind: round(value, 3) for kind, value in kinds.items()}
    return found


def agreement(rounds: Sequence[Round], peer: Round) -> dict[str, Any]:
    """How many answers equal the peer's, token by token, in every round and repetition, and where the others part
    first."""
    found: dict[str, Any] = {}
    for work, repetitions in peer["answers"].items():
        expected = {prompt: tokens for answers in reversed(repetitions) for prompt, tokens in answers.items()}
        parted: dict[str, int] = {}
        for answers in (answers for one in rounds for answers in one["answers"][work]):
            for prompt, ours in answers.items():
                pairs = zip(ours, expected[prompt], strict=True)
                place = next((at for at, (mine, other) in enumerate(pairs) if mine != other), None)
                if place is not None:
                    parted[prompt] = min(place, parted.get(prompt, place))
        found[work] = {"equal": len(expected) - len(parted), "answers": len(expected), "parted_at": parted}
    return found


def cache_bytes(config: Mapping[str, Any], tokens: int) -> int:
    """Bytes of keys and values in float32 for that many tokens."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return 2 * 4 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * width * tokens


def bytes_read_curve(seconds: float, weights: int, per_token: int, contexts: Sequence[int]) -> list[float]:
    """Seconds per token at each context if time followed the bytes that a step must read (weights and cache),
    from the `seconds` at the first context on."""
    start = weights + per_token * contexts[0]
    return [seconds * (weights + per_token * context) / start for context in contexts]


def table(results: Mapping[str, Any]) -> list[str]:
    """The results as lines of text: medians, and below them how many times as good as the peer."""
    sides = [side for side in LABELS if side in results["figures"]]
    need = results["bytes"]["weights"] + results["bytes"]["cache"]
    heads = [LABELS[side].partition(" + ") for side in sides]
    rows = [("", [first for first, _, _ in heads]), ("", [f"+ {rest}" if rest else "" for _, _, rest in heads])]
    for name, figure in FIGURES.items():
        medians = [results["figures"][side][name]["median"] * figure.factor for side in sides]
        rows.append((figure.title, [f"{median:.{figure.digits}f}" for median in medians]))
        ratios = [results["ratios"].get(side) for side in sides]
        rows.append(("", [times(ratio[name]) if ratio else "" for ratio in ratios]))
    peaks = {side: results["figures"][side]["peak"]["median"] for side in sides}
    rows.append(("peak memory / (weights + cache)", [f"{peaks[side] / need:.2f}" for side in sides]))
    lines = [f"{title:<32}" + "".join(f"{cell:>22}" for cell in cells) for title, cells in rows]
    libraries = results["bytes"]["libraries"]
    shares = [f"{LABELS[side]} {(peaks[side] - libraries[library_of(side)]) / need:.2f}" for side in sides]
    lines += ["", f"peak memory without the libraries alone / (weights + cache): {', '.join(shares)}"]
    alone = ", ".join(f"{kind} {size / 2**20:.0f}" for kind, size in libraries.items())
    lines.append(f"the libraries alone, MiB: {alone}")
    lines.append("x (lowest, highest): times as good as the peer, above 1 is better; median of pairs measured in turn")
    for side, found in results["against_dynamic"].items():
        said = ", ".join(f"{name} {times(ratio)}" for name, ratio in found.items())
        lines.append(f"{LABELS[side]} beside {LABELS[DYNAMIC_OF[side]]}: {said}")
    for side, found in results["agreement"].items():
        said = ", ".join(f"{work}: {row['equal']} of {row['answers']}" for work, row in found.items())
        lines.append(f"{LABELS[side]}: answers equal to the peer's token by token: {said}")
    for side, reason in results["not_available"].items():
        lines.append(f"{LABELS[side]}: not available ({reason})")
    lines += growth_table(results["growth"], results["growth_ratios"])
    return [line for line in lines if line == "" or line.strip()]


def times(ratio: Ratio) -> str:
    return f"x{ratio['median']:.2f} ({ratio['low']:.2f}, {ratio['high']:.2f})"


def library_of(side: str) -> str:
    """Under which name the memory of a side's libraries alone is kept."""
    return PEER if side == PEER else TOOLCHAIN


def growth_table(found: Growth, ratios: Mapping[str, Mapping[str, Ratio]]) -> list[str]:
    """Milliseconds per decoded token at each context, a line per side, and how many times as good as the peer."""
    if not found:
        return []
    contexts = list(next(iter(found.values())))
    lines = ["", "ms per decoded token at context " + "".join(f"{context:>10}" for context in contexts)]
    for side, row in found.items():
        lines.append(f"{LABELS[side]:<32}" + "".join(f"{row[context]['median'] * 1000:>10.1f}" for context in contexts))
        if side in ratios:
            cells = (f"x{ratios[side][context]['median']:.2f}" for context in contexts)
            lines.append(" " * 32 + "".join(f"{cell:>10}" for cell in cells))
    return lines


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Bars of the corners with the peer as a line; below them the growth curve, where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure as Canvas

    grown = bool(results["growth"])
    canvas = Canvas(figsize=(13, 8 if grown else 4.4), layout="constrained")
    grid = canvas.add_gridspec(2 if grown else 1, 3)
    for column, name in enumerate(("prefill", "decode_1", "decode_8")):
        _bars(canvas.add_subplot(grid[0, column]), name, results)
    if grown:
        _curves(canvas.add_subplot(grid[1, :]), results)
    machine = results["machine"]
    canvas.suptitle(
        f"{results['model']}, {results['dtype']}, {machine['processor']}, {machine['threads']} threads, "
        f"{results['date'][:10]} (rounds: {results['settings']['rounds']}; bar: median, tick: best; "
        "×: times as good as Hugging Face transformers at that time)",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=120)


def _bars(axes: Any, name: str, results: Mapping[str, Any]) -> None:
    sides = list(LABELS)
    tallest = max((found[name]["best"] for found in results["figures"].values()), default=1.0)
    for place, side in enumerate(sides):
        found = results["figures"].get(side, {}).get(name)
        if found is None:
            axes.text(place, 0, "not\nmeasured", ha="center", va="bottom", color="grey", fontsize=8)
            continue
        axes.bar(place, found["median"], color=COLOURS[side], width=0.75)
        axes.plot(place, found["best"], marker="_", color="black", markersize=16)
        ratio = results["ratios"].get(side)
        number = f"{found['median']:.{0 if found['median'] >= 100 else 1}f}"
        inside = found["median"] > 0.2 * tallest
        axes.annotate(
            number + (f"\n×{ratio[name]['median']:.2f}" if ratio else ""),
            *((place, found["median"] if inside else found["best"]), (0, -6 if inside else 6)),
            **{"textcoords": "offset points", "ha": "center", "va": "top" if inside else "bottom", "fontsize": 9},
        )
    if PEER in results["figures"]:
        axes.axhline(results["figures"][PEER][name]["median"], color=COLOURS[PEER], linestyle="--", zorder=0)
    labels = [LABELS[side].replace(" + ", " +\n").replace(" ", "\n").replace("\n+", " +") for side in sides]
    axes.set_xticks(range(len(sides)), labels, fontsize=8)
    axes.set_title(f"{FIGURES[name].title}\n(higher is better)", fontsize=10)
    axes.set(ylim=(0, tallest * 1.08), xlim=(-0.5, len(sides) - 0.5))
    axes.spines[["top", "right"]].set_visible(False)


def _curves(axes: Any, results: Mapping[str, Any]) -> None:
    per_token = results["bytes"]["cache_per_token"]
    for side, row in results["growth"].items():
        contexts = [int(context) for context in row]
        seconds = [found["median"] for found in row.values()]
        axes.plot(contexts, [value * 1000 for value in seconds], "o-", color=COLOURS[side], label=LABELS[side])
        read = bytes_read_curve(seconds[0], results["bytes"]["weights"], per_token, contexts)
        axes.plot(contexts, [value * 1000 for value in read], ":", color=COLOURS[side])
    axes.plot([], [], ":", color="grey", label="if time followed the bytes of weights and cache alone")
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.set(xlabel="context, tokens", ylabel="ms per decoded token, batch 1", ylim=(0, None))
    axes.set_title("growth of a decoding step with the context", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
