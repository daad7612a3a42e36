"""`--dry_run`: what a run would do, computed from the same code that does it. Loads no Paddle."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from utils.data.encode import IGNORED
from utils.data.template import ChatTemplate
from utils.families.base import ModelShape
from utils.families.tokenizers import Tokenizer
from utils.training.batches import batch_sizes

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
SHOWN_TOKENS = 400


def argument_lines(args: Any) -> list[str]:
    """Every argument with its value, marked where the user gave none."""
    lines = []
    for name, value in args.to_json().items():
        mark = "" if name in args.provided else "  (default)"
        lines.append(f"  {name} = {value!r}{mark}")
    return lines


def marked_example(item: Any, tokenizer: Tokenizer) -> str:
    """One example as text; what the loss sees stands between ⟦ and ⟧."""
    ids, labels = list(item["input_ids"])[:SHOWN_TOKENS], list(item["labels"])[:SHOWN_TOKENS]
    # labels are shifted: the label at t supervises the token at t + 1
    learned = [False, *(label != IGNORED for label in labels)]
    tokens = [*ids, int(labels[-1])] if labels[-1] != IGNORED else ids
    text, start = "", 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or learned[end] != learned[start]:
            part = tokenizer.decode([int(i) for i in tokens[start:end]], skip_special=False)
            text += f"⟦{part}⟧" if learned[start] else part
            start = end
    return text


def steps(args: Any, examples: int | None) -> tuple[int, int]:
    """(optimizer steps per epoch, of the whole run); a stream has as many as max_steps says."""
    if examples is None:
        return args.max_steps, args.max_steps
    sizes = batch_sizes(examples, args.per_device_train_batch_size, args.gradient_accumulation_steps)
    per_epoch = max(1, len(sizes) // min(args.gradient_accumulation_steps, max(len(sizes), 1)))
    return per_epoch, args.max_steps if args.max_steps > 0 else int(per_epoch * args.num_train_epochs)


def trainable_parameters(args: Any, shape: ModelShape) -> int:
    """How many weights the run trains (LoRA: of the default targets)."""
    width = shape.head_dim * shape.kv_heads
    if args.prefix_tuning:
        size = 2 * shape.layers * width
        hidden = args.prefix_projection_hidden_size or shape.hidden
        if args.prefix_projection:
            return args.num_prefix_tokens * width + width * hidden + hidden * size
        return args.num_prefix_tokens * size
    if args.lora:
        query = shape.head_dim * shape.heads
        pairs = [(shape.hidden, query), (shape.hidden, width), (shape.hidden, width), (query, shape.hidden)]
        pairs += [(shape.hidden, shape.intermediate)] * 2 + [(shape.intermediate, shape.hidden)]
        return shape.layers * args.lora_rank * sum(a + b for a, b in pairs)
    return shape.parameters


def memory_bytes(args: Any, shape: ModelShape, dtype: str) -> dict[str, float]:
    """Estimated memory of one device: weights, gradients, optimizer, activations of a micro-batch.

    Activations after Korthikanti et al. 2022 (arXiv:2205.05198), table 2, without their attention
    term's recomputation: 34 s b h per layer, and 5 a s^2 b for attention; with recomputation one
    layer's worth and 2 s b h per layer. Logits of all positions are counted: the longest answer may
    supervise nearly all of them.
    """
    trained = trainable_parameters(args, shape)
    size = BYTES[dtype]
    tokens = args.max_length * args.per_device_train_batch_size
    layer = tokens * (34 * shape.hidden + 5 * shape.heads * args.max_length) * size / 2
    kept = layer + shape.layers * 2 * tokens * shape.hidden * size if args.recompute else layer * shape.layers
    return {
        "weights": shape.parameters * size,
        "gradients": trained * size,
        "optimizer": trained * (8 + (4 if size == 2 else 0)),
        "activations": kept + 3 * tokens * shape.vocabulary * 4,
    }


def training_lines(args: Any, dataset: Any, tokenizer: Tokenizer) -> list[str]:
    """Steps, tokens per step, and one example with its loss mask visible."""
    examples = len(dataset) if hasattr(dataset, "__len__") else None
    per_epoch, total = steps(args, examples)
    lines = [f"steps: {total:,} ({per_epoch:,} per epoch)"]
    if examples:
        tokens = dataset.report.tokens / per_epoch
        lines.append(f"tokens per step: about {tokens:,.0f}")
    lines += [
        "first example (the loss sees what stands in ⟦⟧):",
        marked_example(next(iter(dataset)), tokenizer),
    ]
    return lines


def report(
    args: Any,
    shape: ModelShape,
    dtype: str,
    device: str,
    data: dict[str, Any],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    resumed: Path | None,
) -> str:
    """The whole report as text."""
    memory = {name: value / 2**30 for name, value in memory_bytes(args, shape, dtype).items()}
    trained = trainable_parameters(args, shape) / 1e6
    lines = []
    for split, dataset in data.items():
        lines += [f"{split} data: {line}" for line in dataset.summary().splitlines()]
    if "train" in data:
        lines += training_lines(args, data["train"], tokenizer)
    return "\n".join(
        [
            "arguments:",
            *argument_lines(args),
            f"device: {device}, computing in {dtype}",
            f"model: {shape.parameters / 1e6:,.0f} M parameters, {trained:,.2f} M trained",
            f"chat template: {template.source}",
            *lines,
            f"memory per device, estimated: {math.fsum(memory.values()):.2f} GiB at rows of max_length ("
            + ", ".join(f"{name} {value:.2f}" for name, value in memory.items())
            + ")",
            f"starts: {f'from {resumed}' if resumed else 'anew'}",
            f"would write: {args.output_dir}/ (weights, tokenizer, template, checkpoints, results, loss curve)",
        ]
    )
