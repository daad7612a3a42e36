"""The two evaluations: how likely the targets of rows are, and generated answers, which BLEU and ROUGE judge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from utils.checkpoints.files import atomic_write
from utils.data.encode import encode_source
from utils.data.lines import naming
from utils.data.rows import Row
from utils.data.template import ChatTemplate
from utils.families.tokenizers import Tokenizer
from utils.inference.generator import Generator
from utils.inference.sampling import SamplingOptions
from utils.parallel.process_group import ProcessGroup
from utils.training.accumulation import Autocast
from utils.training.answers import engine_over
from utils.training.inputs import SIZES
from utils.training.loader import Loader
from utils.training.metrics import likelihood_metrics, text_metrics
from utils.training.model import TrainingModel

OUTPUT = "generated_output.json"
BAR_DELAY = 5.0  # seconds before an evaluation shows a bar


def likelihood(
    model: TrainingModel, loader: Loader, autocast: Autocast, processes: ProcessGroup, keep: int | None
) -> dict[str, float]:
    """loss, ppl and accuracy over the targets of all rows; the same on every rank.

    Args:
        loader: of this rank's batches, see `EvaluationSampler`.
        keep: the scores of so many batches (None: of all) stay on the device before they move to memory.
    """
    scores, kept = np.zeros(3), []  # sum of losses, right guesses, targets
    bar = tqdm(loader, disable=not processes.first, desc="evaluating", unit="batch", delay=BAR_DELAY, leave=False)
    for number, inputs in enumerate(bar):
        inputs.pop(SIZES)
        with autocast():
            found = model.score(**inputs)
        if number < loader.sampler.own:
            kept.append(found)
        if keep is not None and len(kept) >= keep:
            scores, kept = sum((one.numpy() for one in kept), scores), []
    scores = sum((one.numpy() for one in kept), scores)
    loss, right, targets = processes.sums(scores if processes.layout.counts else np.zeros(3))
    return likelihood_metrics(loss, int(right), int(targets))


class GenerationEvaluation:
    """Answers rows with the model as it is now and measures the answers.

    Args:
        config: the config.json of the model's checkpoint.
        rows: each with a question and its answer (of a conversation, the last one).
        options: how to generate; greedy unless the user said otherwise.
        output_dir: where `generated_output.json` goes, or None to keep no outputs. The outputs of
            each evaluation stay in `generated_output-step-N.json`.
        processes: the processes that share the rows.
    """

    def __init__(
        self,
        model: TrainingModel,
        config: Mapping[str, Any],
        tokenizer: Tokenizer,
        template: ChatTemplate,
        rows: Sequence[Row],
        options: SamplingOptions,
        *,
        src_length: int,
        batch_size: int,
        output_dir: Path | None,
        processes: ProcessGroup | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model, self.config, self.tokenizer, self.rows = model, config, tokenizer, rows
        self.stop_ids = template.stop_ids(tokenizer)
        self.options, self.batch_size, self.output_dir = options, batch_size, output_dir
        self.processes = processes or ProcessGroup()
        self.show_progress = show_progress and self.processes.first
        ranks, rank = self.processes.layout.readers, self.processes.layout.reader(self.processes.layout.rank)
        self.numbers = range(len(rows))[rank::ranks]  # of the rows that this rank answers
        self.prompts = []
        for number in self.numbers:
            row = rows[number]
            with naming(row.place):
                self.prompts.append(encode_source(row.question, tokenizer, template, src_length, row.tools)[0])

    def __call__(self, step: int, name: str = OUTPUT) -> dict[str, float]:
        """bleu4, rouge1, rouge2, rougel of the answers given now."""
        self.model.eval()
        model = self.model
        engine = engine_over(
            model.family, model.base, self.config, self.processes, prefix=model.prefix, stages=model.stages
        )
        generator = Generator(engine, self.tokenizer, self.stop_ids)
        with tqdm(
            total=len(self.prompts), unit="row", desc="answering", leave=False, disable=not self.show_progress
        ) as bar:
            found = generator.generate(
                self.prompts,
                self.options,
                self.batch_size,
                on_row=lambda *_: bar.update(),
                numbers=list(self.numbers),
            )
        outputs = self._of_all_ranks([completion.text for completion in found])
        references = [row.answer or "" for row in self.rows]
        if self.output_dir is not None and self.processes.first:
            lines = [
                json.dumps(
                    {"src": row.question[-1]["content"], "tgt": row.answer, "output": text},
                    ensure_ascii=False,
                )
                for row, text in zip(self.rows, outputs, strict=True)
            ]
            text = "\n".join(lines) + "\n"
            atomic_write(self.output_dir / name, text)
            atomic_write(self.output_dir / name.replace(".json", f"-step-{step}.json"), text)
        return text_metrics(outputs, references)

    def _of_all_ranks(self, texts: list[str]) -> list[str]:
        """The answers to all rows in their order, on every rank."""
        self.processes.barrier("waiting for the answers of other ranks")
        outputs = [""] * len(self.rows)
        parts = self.processes.gather(texts)
        for rank, part in enumerate(parts):
            outputs[self.processes.layout.reader(rank) :: self.processes.layout.readers] = part
        return outputs
