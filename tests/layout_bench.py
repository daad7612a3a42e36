"""Trainings that several layouts save and continue, each compared with that of one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from family_cases import FIXTURES
from many_runs import Job, figures, launch_jobs
from tiny_models import write_tiny_llama
from tiny_runs import Tiny, run_main, write_rows

STEPS, HALFWAY = 10, 5
DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "attention_dropout", "hidden_dropout")
TENSOR, PIPELINE = ["--tensor_parallel_degree", 2], ["--pipeline_parallel_degree", 2]
STAGE1, STAGE2, STAGE3 = (["--sharding", f"stage{stage}"] for stage in (1, 2, 3))
# processes, rows of a micro-batch, micro-batches (8 rows a step), arguments
LAYOUTS: dict[str, tuple[int, int, int, list[object]]] = {
    "one": (1, 8, 1, []),
    "TP2": (2, 4, 2, TENSOR),
    "PP2": (2, 2, 4, PIPELINE),
    "stage1": (2, 2, 2, STAGE1),
    "stage2": (2, 2, 2, STAGE2),
    "stage3": (2, 2, 2, STAGE3),
    "TP2 PP2": (4, 2, 4, [*TENSOR, *PIPELINE]),
    "DP4": (4, 2, 1, []),
}
METHODS: dict[str, list[object]] = {
    "sft": ["--learning_rate", 3e-3, "--weight_decay", 0.1, "--unified_checkpoint", "true"],
    "shards": ["--learning_rate", 3e-3, "--weight_decay", 0.1],
    "lora": ["--lora"],
    "prefix": ["--prefix_tuning", "--num_prefix_tokens", 4, "--learning_rate", 0.1],
}


@dataclass(frozen=True)
class Work:
    """What is trained: a model and a method."""

    model: str
    method: str
    more: tuple[object, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.model}-{self.method}" + "".join(str(word).lstrip("-") for word in self.more[:1])


class Bench:
    """A folder of models without dropout, rows for all of them, and runs."""

    def __init__(self, home: Path) -> None:
        self.home = home
        for seed, (split, count) in enumerate({"train": 50, "dev": 10, "test": 6}.items()):
            write_rows(home / "data" / f"{split}.json", count, seed=seed)

    def tiny(self, name: str) -> Tiny:
        """A model: one of the fixtures, or a LLaMA with tied embedding, one KV head ("kv1"), odd vocabulary ("odd")."""
        home = self.home / "models" / name
        if home.is_dir():
            return Tiny(home)
        home.mkdir(parents=True)
        (home / "data").symlink_to(self.home / "data")
        (home / "cache").symlink_to(self.home / "cache")
        (self.home / "cache").mkdir(exist_ok=True)
        if name in ("llama", "kv1", "odd"):
            sizes = {"llama": {"tie_word_embeddings": True}, "kv1": {"num_key_value_heads": 1}, "odd": {}}[name]
            if name == "odd":
                config = json.loads((self.tiny("llama").model / "config.json").read_text("utf-8"))
                sizes = {"vocab_size": config["vocab_size"] + 1 - config["vocab_size"] % 2}
            write_tiny_llama(home / "model", initializer_range=0.05, **sizes)
        else:
            shutil.copytree(FIXTURES / name, home / "model")
            config = json.loads((home / "model" / "config.json").read_text("utf-8"))
            (home / "model" / "config.json").write_text(json.dumps(config | dict.fromkeys(DROPOUTS, 0.0)), "utf-8")
        return Tiny(home)

    def words(self, work: Work, layout: str, output: Path, *more: object) -> list[str]:
        """The command line of a run that saves a checkpoint after half of its steps."""
        _, rows, micro_batches, options = LAYOUTS[layout]
        common = ["--do_train", "--do_eval", "--max_steps", STEPS, "--lr_scheduler_type", "constant"]
        common += ["--save_strategy", "steps", "--save_steps", HALFWAY, "--per_device_train_batch_size", rows]
        common += ["--gradient_accumulation_steps", micro_batches]
        return self.tiny(work.model).arguments(output, [*common, *METHODS[work.method], *options, *work.more, *more])

    def run(self, works: Sequence[Work], layout: str, start: str | None = None) -> list[Path]:
        """Runs all works in a layout, from the checkpoints of another layout's run if there is a `start`."""
        outputs = []
        for work in works:
            output = self.output(work, layout, start)
            if start is not None:
                halfway = f"checkpoint-{HALFWAY}"
                shutil.copytree(self.output(work, start) / halfway, output / halfway)
            outputs.append(output)
        processes = LAYOUTS[layout][0]
        words = [self.words(work, layout, output) for work, output in zip(works, outputs, strict=True)]
        if processes == 1:
            for output, one in zip(outputs, words, strict=True):
                run_main("finetune_generation", one, {"PADDLE_LLM_CACHE": str(self.home / "cache")}, output, 0)
        else:
            jobs = [Job(output, one) for output, one in zip(outputs, words, strict=True)]
            launch_jobs(jobs, self.home / "logs" / f"{layout}-{start}", processes, self.home / "cache")
        return outputs

    def output(self, work: Work, layout: str, start: str | None = None) -> Path:
        return self.home / "runs" / (layout if start is None else f"{start} to {layout}") / work.name

    def difference(self, work: Work, layout: str, start: str | None = None) -> float:
        """The largest of a loss or gradient norm of a run from that of one process without a break."""
        ours, wanted = (
            np.array(list(figures(o))) for o in (self.output(work, layout, start), self.output(work, "one"))
        )
        assert len(wanted) == STEPS and ours.shape == wanted.shape
        return float(np.abs(ours - wanted).max())
