"""The training loop, what it says and keeps, and how processes share it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from utils.arguments.fields import Arguments, arg
from utils.arguments.groups.common import DEVICE_HELP

GENERATING = ["eval_with_do_generation"]


@dataclass
class GenerateArguments(Arguments):
    """Generation during evaluation."""

    group: ClassVar[str] = "Generation during evaluation"

    eval_with_do_generation: bool = arg(
        False, "evaluate generated answers (BLEU-4 and Rouge) instead of perplexity and accuracy"
    )
    save_generation_output: bool = arg(False, "keep them in generated_output.json in output_dir", needs=GENERATING)
    eval_max_new_tokens: int | None = arg(
        None,
        "longest generated answer; max_length - src_length, at most 512, by default",
        minimum=1,
        unit="tokens",
        needs=GENERATING,
    )
    top_k: int = arg(1, "sample from the k likeliest tokens; 1 is greedy, 0 is all", minimum=0, needs=GENERATING)
    top_p: float = arg(1.0, "sample from the likeliest tokens of this total", above=0, maximum=1, needs=GENERATING)
    temperature: float = arg(1.0, "divides the logits; 0 is greedy", minimum=0, needs=GENERATING)


@dataclass
class TrainingArguments(Arguments):
    """The training loop: what it does, how it learns, when it saves, on which devices."""

    group: ClassVar[str] = "Training"

    output_dir: str | None = arg(None, "folder for weights, checkpoints and results", path=True)
    overwrite_output_dir: bool = arg(
        False, "start anew: checkpoints and results of an earlier training in output_dir go, and nothing else"
    )
    do_train: bool = arg(False, "train")
    do_eval: bool = arg(False, "evaluate on the dev rows; in pretraining, on the validation part of split")
    do_predict: bool = arg(False, "evaluate on the rows of test.json; in pretraining, on the test part of split")
    dry_run: bool = arg(False, "show what would happen and stop before the weights load")
    per_device_train_batch_size: int = arg(8, "rows per device and forward", minimum=1, unit="rows")
    per_device_eval_batch_size: int = arg(8, "rows per device and forward in evaluation", minimum=1, unit="rows")
    gradient_accumulation_steps: int = arg(1, "forwards per update", minimum=1)
    eval_accumulation_steps: int | None = arg(
        None,
        "evaluation batches whose scores are kept on the device before they move to memory; all by default",
        minimum=1,
        unit="batches",
    )
    num_train_epochs: float = arg(3.0, "how often every row is seen", above=0, unit="epochs")
    max_steps: int = arg(-1, "updates; overrides num_train_epochs when positive", minimum=-1, unit="updates")
    learning_rate: float = arg(5e-5, "highest learning rate", minimum=0)
    lr_scheduler_type: str = arg(
        "linear",
        "course of the learning rate after warm-up",
        choices=("linear", "cosine", "constant", "constant_with_warmup", "polynomial"),
    )
    warmup_steps: int = arg(0, "updates of warm-up; overrides warmup_ratio when positive", minimum=0, unit="updates")
    warmup_ratio: float = arg(0.0, "share of all updates that warm up", minimum=0, maximum=1)
    weight_decay: float = arg(0.0, "AdamW's decay of matrices; vectors (norms, biases) do not decay", minimum=0)
    adam_beta1: float = arg(0.9, "AdamW's first moment", minimum=0, below=1)
    adam_beta2: float = arg(0.999, "AdamW's second moment", minimum=0, below=1)
    adam_epsilon: float = arg(1e-8, "AdamW's epsilon", above=0)
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this norm; 0 leaves them", minimum=0)
    seed: int = arg(42, "seed of weights, order and dropout", minimum=0, maximum=2**32 - 1)
    dropout: float | None = arg(
        None,
        "share that training drops of attention, hidden states and embeddings, as far as the model's family drops "
        "any; those of its config.json by default",
        minimum=0,
        below=1,
        needs=["do_train"],
    )
    recompute: bool = arg(False, "compute activations twice to save memory")
    fp16: bool = arg(False, "compute in float16 where the device can")
    bf16: bool = arg(False, "compute in bfloat16 where the device can")
    fp16_opt_level: str = arg(
        "O1",
        "O1: chosen operators in half precision; O2: the weights too",
        choices=("O1", "O2"),
        needs=["fp16", "bf16"],
    )
    dataloader_num_workers: int = arg(
        0, "batches that a thread makes ahead of the training; 0 makes each when it is needed", minimum=0
    )
    device: str = arg("gpu", DEVICE_HELP)

    @property
    def output(self) -> Path:
        """The folder of output_dir, which the checks ask for."""
        return Path(self.output_dir or "")


@dataclass
class ReportArguments(Arguments):
    """What a training run says, keeps and resumes from."""

    group: ClassVar[str] = "Logging, evaluation and saving"

    logging_strategy: str = arg("steps", "when to log", choices=("no", "steps", "epoch"))
    logging_steps: int = arg(500, "updates between two log lines", minimum=1, unit="updates")
    logging_dir: str | None = arg(None, "folder of VisualDL's log; within output_dir by default", path=True)
    report_to: list[str] = arg(  # noqa: RUF009
        ["visualdl"],
        "trackers that get the figures, if installed",
        choices=("visualdl", "tensorboard", "wandb", "swanlab", "none"),
    )
    run_name: str | None = arg(None, "name of the run in the trackers")
    disable_tqdm: bool = arg(False, "show no progress bar")
    skip_memory_metrics: bool = arg(True, "leave train_memory_gib out of train_results.json")
    evaluation_strategy: str = arg("no", "when to evaluate in training", choices=("no", "steps", "epoch"))
    eval_steps: int | None = arg(
        None, "updates between evaluations; logging_steps by default", minimum=1, unit="updates"
    )
    eval_on_start: bool = arg(False, "evaluate before the first update too, to compare with")
    save_strategy: str = arg(
        "no",
        "when to save checkpoints; steps if save_steps alone is given; an interrupted training saves one anyway",
        choices=("no", "steps", "epoch"),
    )
    save_steps: int = arg(500, "updates between checkpoints", minimum=1, unit="updates")
    save_total_limit: int | None = arg(None, "checkpoints kept; older ones are deleted; all by default", minimum=1)
    load_best_model_at_end: bool = arg(False, "end with the best checkpoint instead of the last")
    metric_for_best_model: str | None = arg(
        None,
        "what best means: accuracy, ppl or loss; with eval_with_do_generation bleu4, rouge1, rouge2 or "
        "rougel; loss or bleu4 by default",
    )
    greater_is_better: bool | None = arg(None, "whether more of it is better; false for loss and ppl by default")
    resume_from_checkpoint: bool | str | None = arg(
        None, "a checkpoint folder, or true for the last one in output_dir", path=True
    )


@dataclass
class ParallelArguments(Arguments):
    """How the processes of a launch share the work; data parallelism takes what is left."""

    group: ClassVar[str] = "Parallel training"

    tensor_parallel_degree: int = arg(-1, "processes that share every layer; -1 is none", minimum=-1)
    pipeline_parallel_degree: int = arg(-1, "processes that share the layers in turn; -1 is none", minimum=-1)
    virtual_pp_degree: int = arg(
        1, "parts of the layers that each pipeline stage has: more of them wait less for each other", minimum=1
    )
    sharding: str = arg(
        "",
        "what data-parallel processes share: optimizer state, gradients, weights",
        choices=("", "stage1", "stage2", "stage3"),
        refused={
            f"{stage} offload": f"state on the CPU is not part of this version; use {stage}, with more processes"
            for stage in ("stage2", "stage3")
        },
    )
    sharding_parallel_degree: int = arg(
        -1, "processes that share by sharding; -1 is all that are left", minimum=-1, needs=["sharding"]
    )
    sequence_parallel: bool = arg(False, "split the sequence too; needs tensor_parallel_degree above 1")
    unified_checkpoint: bool = arg(
        False, "SFT: checkpoints of tensor-parallel runs hold whole weights, not a shard per process"
    )
    async_save: bool = arg(False, "train on while a checkpoint is written; needs memory for a copy of it")
