"""Trainings that several layouts save and continue, each compared with that of one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    "DP2": (2, 4, 1, []),
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
    """A training.

    Attributes:
        model: see `Bench.tiny`.
        more: further arguments.
        start: the layout that has made the first half of the steps, as another run; None for a run without a break.
    """

    model: str
    method: str
    more: tuple[object, ...] = ()
    start: str | None = None

    @property
    def name(self) -> str:
        words = [self.model, self.method, *(str(word).lstrip("-") for word in self.more[:1])]
        return "-".join(words) + (f" from {self.start}" if self.start else "")


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

    def run(self, layout: str, works: Sequence[Work]) -> None:
        """Runs all works in a layout, several processes in one launch; those with a start from its checkpoint."""
        outputs = [self.output(work, layout) for work in works]
        for work, output in zip(works, outputs, strict=True):
            if work.start is not None:
                halfway = f"checkpoint-{HALFWAY}"
                shutil.copytree(self.output(replace(work, start=None), work.start) / halfway, output / halfway)
        words = [self.words(work, layout, output) for work, output in zip(works, outputs, strict=True)]
        processes, cache = LAYOUTS[layout][0], self.home / "cache"
        if processes > 1:
            jobs = [Job(output, one) for output, one in zip(outputs, words, strict=True)]
            launch_jobs(jobs, self.home / "logs" / layout, processes, cache)
            return
        for output, one in zip(outputs, words, strict=True):
            run_main("finetune_generation", one, {"PADDLE_LLM_CACHE": str(cache)}, output, 0)

    def output(self, work: Work, layout: str) -> Path:
        return self.home / "runs" / layout / work.name

    def alone(self, work: Work) -> Path:
        """The output of one process without a break, which is run the first time."""
        whole = replace(work, start=None)
        if not self.output(whole, "one").is_dir():
            self.run("one", [whole])
        return self.output(whole, "one")

    def check(self, work: Work, layout: str, bound: float = 1e-4) -> None:
        """Compares the losses and gradient norms of a run with those of one process without a break."""
        ours, wanted = (np.array(list(figures(o))) for o in (self.output(work, layout), self.alone(work)))
        assert len(wanted) == STEPS
        np.testing.assert_allclose(ours, wanted, atol=bound, rtol=0, err_msg=f"{work} as {layout}")
        print(f"{layout}: {work.name}: {np.abs(ours - wanted).max():.1e}")
