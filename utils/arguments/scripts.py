"""The argument classes of the scripts: one flat dataclass each, put together from the groups."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from utils.arguments import checks, notices, pretrain_checks, serve_checks
from utils.arguments.fields import Option, options_of
from utils.arguments.groups.answering import (
    AnsweringArguments,
    BasicSamplingArguments,
    PredictorArguments,
    SamplingArguments,
)
from utils.arguments.groups.data import DataArguments, PretrainDataArguments
from utils.arguments.groups.model import AdapterArguments, ModelArguments
from utils.arguments.groups.quantization import QuantArguments
from utils.arguments.groups.serving import HttpArguments, ServedArguments
from utils.arguments.groups.tools import TextArguments, TokenFileArguments
from utils.arguments.groups.training import (
    GenerateArguments,
    ParallelArguments,
    ReportArguments,
    TrainingArguments,
)
from utils.arguments.groups.weights import ExportingArguments, MergeArguments, MergeShardsArguments
from utils.parallel.topology import Layout

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
        checks.model_required,
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


RunArguments = FinetuneArguments | PretrainArguments  # of a training


@dataclass
class PredictArguments(SamplingArguments, PredictorArguments):
    """Answers the prompts of a file, or chats, with a model and, if wanted, an adapter or a prefix."""

    renamed: ClassVar[dict[str, str]] = RENAMED_LENGTHS
    checks: ClassVar = (
        checks.model_required,
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
        said = _leave_room(self)
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


def _leave_room(run: Any) -> list[str]:
    """Lowers a src_length that the user has not chosen where max_length leaves no room for an answer."""
    if "src_length" in run.provided or run.src_length < run.max_length:
        return []
    run.src_length = run.max_length // 2
    return [f"src_length is {run.src_length}, half of {run.where('max_length')}"]


@dataclass
class ServeArguments(ServedArguments, HttpArguments, BasicSamplingArguments, AnsweringArguments):
    """Serves a model over HTTP, to OpenAI clients too, with a page to chat."""

    renamed: ClassVar[dict[str, str]] = {
        **RENAMED_LENGTHS,
        "base_port": "flask_port",
        "batch_size": "max_batch_size",
    }
    # The toolchain's document sends readers to the options of predictor.py.
    foreign: ClassVar[Mapping[str, Option]] = options_of(PredictArguments)
    checks: ClassVar = (
        checks.model_required,
        checks.static_folder,
        checks.low_bit_inference,
        checks.one_adapter,
        checks.lengths,
        checks.named_files,
        serve_checks.ports,
        serve_checks.protection,
        serve_checks.key,
        serve_checks.origins,
        serve_checks.names,
        serve_checks.adapters,
        serve_checks.page,
    )

    def settle(self) -> list[str]:
        """Derives api_key, served_model_name, and a src_length that leaves room for the answer."""
        said = _leave_room(self)
        variable = serve_checks.KEY_VARIABLE
        if self.api_key is None and self.api_key_file is not None:
            self.api_key = serve_checks.key_in(self.api_key_file)
        elif self.api_key is None:
            self.api_key = os.environ.get(variable) or None
            if self.api_key is not None and Layout.of_prediction().world > 1:
                said.append(
                    f"{variable}: Paddle's launcher writes all variables into its log folder; set api_key_file instead"
                )
        elif self.origin("api_key") == "--api_key":
            said.append(f"--api_key: the process list shows it to every user of this machine; set {variable} instead")
        if self.served_model_name is None and self.model_name_or_path is not None:
            self.served_model_name = serve_checks.name_of(self.model_name_or_path)
        return said

    @property
    def adapters(self) -> list[tuple[str, str]]:
        """(served name, folder) of each of `lora_modules`."""
        return serve_checks.read_adapters(self.lora_modules)


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
