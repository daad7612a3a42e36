"""The argument classes of the scripts: one flat dataclass each, put together from the groups."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

from utils.arguments import checks, notices, pretrain_checks
from utils.arguments.groups import (
    AdapterArguments,
    DataArguments,
    ExportingArguments,
    GenerateArguments,
    MergeArguments,
    MergeShardsArguments,
    ModelArguments,
    ParallelArguments,
    PredictorArguments,
    PretrainDataArguments,
    QuantArguments,
    ReportArguments,
    SamplingArguments,
    TextArguments,
    TokenFileArguments,
    TrainingArguments,
)

# Keys that argument files of earlier toolchains contain.
RENAMED_LENGTHS = {"tgt_length": "max_length", "intokens_max_length": "max_length"}
EVAL_MAX_NEW_TOKENS = 512


@dataclass
class FinetuneArguments(
    QuantArguments,
    ParallelArguments,
    ReportArguments,
    TrainingArguments,
    GenerateArguments,
    DataArguments,
    AdapterArguments,
    ModelArguments,
):
    """Finetunes a model: all weights (SFT), LoRA or prefix tuning; evaluates it."""

    renamed: ClassVar[dict[str, str]] = {
        **RENAMED_LENGTHS,
        "zero_padding": "intokens",
        "shift_all_linears": "shift_all_linear",
        "smooth_all_linear": "smooth_all_linears",
    }
    checks: ClassVar = (
        checks.finetune_required,
        checks.one_method,
        checks.starting_points,
        checks.lengths,
        checks.dataset,
        checks.output_folder,
        checks.generation_in_evaluation,
        checks.steps,
        checks.lazy_reading,
        checks.best_model,
        checks.precision,
        checks.parallel_degrees,
        checks.quantization,
        checks.named_files,
    )

    def settle(self) -> list[str]:
        """Derives lora_alpha, eval_steps, eval_max_new_tokens, the best model's metric and do_eval."""
        if self.lora_alpha is None:
            self.lora_alpha = 2.0 * self.lora_rank
        if self.eval_max_new_tokens is None:
            self.eval_max_new_tokens = max(1, min(self.max_length - self.src_length, EVAL_MAX_NEW_TOKENS))
        _settle_training(self, "bleu4" if self.eval_with_do_generation else "loss")
        return list(notices.training(self))


def _settle_training(run: Any, best: str) -> None:
    """Derives eval_steps, the best model's metric (`best` by default), save_strategy and do_eval."""
    if run.eval_steps is None:
        run.eval_steps = run.logging_steps
    if run.load_best_model_at_end and run.metric_for_best_model is None:
        run.metric_for_best_model = best
    if run.metric_for_best_model is not None:
        run.metric_for_best_model = run.metric_for_best_model.removeprefix("eval_")
        if run.greater_is_better is None:
            run.greater_is_better = run.metric_for_best_model not in ("loss", "ppl")
    if run.resume_from_checkpoint in ("true", "True"):
        run.resume_from_checkpoint = True
    if "save_steps" in run.provided and "save_strategy" not in run.provided:
        run.save_strategy = "steps"
    if run.evaluation_strategy != "no" and "do_eval" not in run.provided:
        run.do_eval = True


@dataclass
class PretrainArguments(ParallelArguments, ReportArguments, TrainingArguments, PretrainDataArguments, ModelArguments):
    """Pretrains a model on plain text, from new random weights or from those that it has."""

    checks: ClassVar = (
        pretrain_checks.required,
        pretrain_checks.text,
        pretrain_checks.shares,
        pretrain_checks.counts_steps,
        pretrain_checks.last_rate,
        checks.output_folder,
        checks.steps,
        checks.best_model,
        checks.precision,
        checks.parallel_degrees,
        checks.named_files,
    )

    def settle(self) -> list[str]:
        """Derives eval_steps, the best model's metric and do_eval."""
        _settle_training(self, "loss")
        return list(notices.training(self))

    @property
    def sources(self) -> list[tuple[float | None, str]]:
        """(weight, folder or prefix) of everything in input_dir; a single one has no weight."""
        return pretrain_checks.read_sources(self.input_dir or "")

    @property
    def shares(self) -> tuple[float, ...]:
        """The three numbers of split."""
        return pretrain_checks.read_shares(self.split)


@dataclass
class PredictArguments(SamplingArguments, PredictorArguments):
    """Answers the prompts of a file, or chats, with a model and, if wanted, an adapter or a prefix."""

    renamed: ClassVar[dict[str, str]] = RENAMED_LENGTHS
    checks: ClassVar = (
        checks.predict_required,
        checks.static_folder,
        checks.low_bit_inference,
        checks.one_adapter,
        checks.lengths,
        checks.new_tokens,
        checks.strategy,
        checks.prediction_files,
        checks.named_files,
    )

    def settle(self) -> list[str]:
        """Derives decode_strategy, max_new_tokens, and a src_length that leaves room for the answer."""
        said = []
        if "src_length" not in self.provided and self.src_length >= self.max_length:
            self.src_length = self.max_length // 2
            said.append(f"src_length is {self.src_length}, half of {self.where('max_length')}")
        if self.max_new_tokens is None:
            self.max_new_tokens = max(1, self.max_length - self.src_length)
        if self.decode_strategy is None:
            greedy = "greedy_search" if self.top_k == 1 else "sampling"
            self.decode_strategy = "beam_search" if self.num_beams > 1 else greedy
        if self.top_k == 1 and self.decode_strategy != "beam_search":
            sampling = {
                "decode_strategy": self.decode_strategy == "sampling",
                "top_p": self.top_p != 1,
                "min_p": self.min_p != 0,
                "temperature": self.temperature not in (0, 1),
            }
            for name in [name for name, wanted in sampling.items() if wanted]:
                said.append(
                    f"{self.where(name)} has no effect while top_k is 1, which is greedy; "
                    "--top_k 0 samples from all tokens"
                )
        return said


@dataclass
class ExportArguments(ExportingArguments):
    """Exports a model, with its adapter if wanted, as a static program with everything it needs."""

    checks: ClassVar = (checks.export_required, checks.one_adapter, checks.named_files)


@dataclass
class MergeLoraArguments(MergeArguments):
    """Merges a LoRA adapter into its base and writes the result as an ordinary model."""

    renamed: ClassVar[dict[str, str]] = {
        "merge_lora_model_path": "merge_model_path",
        "output_path": "merge_model_path",
    }
    checks: ClassVar = (checks.merge_required, checks.merge_folders, checks.shard_size, checks.named_files)

    def settle(self) -> list[str]:
        """Derives merge_model_path: a folder of its own beside the adapter's."""
        if self.merge_model_path is None and self.lora_path is not None:
            self.merge_model_path = f"{os.path.abspath(self.lora_path)}_merged"
        return []

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes (units of 1000)."""
        return checks.bytes_of(self.max_shard_size)


@dataclass
class MergeTpArguments(MergeShardsArguments):
    """Merges the shards of a tensor-parallel run into one ordinary model."""

    renamed: ClassVar[dict[str, str]] = {"output_path": "merge_model_path"}
    checks: ClassVar = (checks.shard_folder, checks.shard_size)

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes (units of 1000)."""
        return checks.bytes_of(self.max_shard_size)


@dataclass
class TransToJsonArguments(TextArguments):
    """Writes plain text files as JSON Lines, one document a line, for create_pretraining_data.py."""

    spellings: ClassVar[dict[str, str]] = {"no-merge": "no_merge", "no-shuffle": "no_shuffle"}
    checks: ClassVar = (pretrain_checks.tool_files,)


@dataclass
class CreatePretrainingDataArguments(TokenFileArguments):
    """Turns JSON Lines into the token files OUTPUT_PREFIX.bin and OUTPUT_PREFIX.idx, for run_pretrain.py."""

    checks: ClassVar = (pretrain_checks.tool_files, pretrain_checks.tool_model)
