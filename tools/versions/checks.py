"""What is compared: each check runs the real scripts of both versions and says how far their results lie apart."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from versions.difference import Difference, Quantities, compare, largest, of_answers, of_training, of_weights
from versions.runs import Outcome, Skipped, Version

STEPS, SAVED = 6, 3  # of a training in one process; where it is interrupted
LAYOUT_STEPS, LAYOUT_SAVED = 4, 2
RATES = {"sft": "3e-3", "lora": "1e-2", "pt": "0.1", "packed": "3e-3", "generation": "1e-2"}
LORA = ("--lora", "true", "--lora_rank", "4")
METHODS: dict[str, tuple[str, ...]] = {
    "sft": ("--weight_decay", "0.1", "--max_grad_norm", "0.5"),
    "lora": (*LORA, "--lora_dropout", "0.1"),
    "pt": ("--prefix_tuning", "true", "--num_prefix_tokens", "4"),
    "packed": ("--intokens", "true", "--recompute", "true"),
    "generation": (*LORA, "--neftune", "true", "--eval_with_do_generation", "true", "--save_generation_output", "true"),
}
GOES_ON = ("sft", "lora", "pt")  # and answers afterwards
# name -> (processes, rows a device, micro-batches, arguments)
TENSOR, PIPELINE = ("--tensor_parallel_degree", "2"), ("--pipeline_parallel_degree", "2")
LAYOUTS: dict[str, tuple[int, int, int, tuple[str, ...]]] = {
    "TP2": (2, 4, 1, TENSOR),
    "PP2": (2, 2, 2, PIPELINE),
    "DP2": (2, 2, 1, ()),
    "stage1": (2, 2, 1, ("--sharding", "stage1")),
    "stage2": (2, 2, 1, ("--sharding", "stage2")),
    "stage3": (2, 2, 1, ("--sharding", "stage3")),
    "TP2 sequence": (2, 4, 1, (*TENSOR, "--sequence_parallel", "true")),
    "TP2 PP2": (4, 2, 2, (*TENSOR, *PIPELINE)),
    "TP2 stage2": (4, 2, 1, (*TENSOR, "--sharding", "stage2")),
    "PP2 stage3": (4, 2, 2, (*PIPELINE, "--sharding", "stage3")),
}
OF_FAMILIES = ("TP2", "PP2")  # depend on how a family computes; the other layouts only on its tensors
OF_ALL = ("DP2", "stage1", "stage2", "stage3")


@dataclass(frozen=True)
class Bench:
    """One family's tiny model in both versions. `data`: rows and plain text, the same for all."""

    family: str
    model: Path
    data: Path
    before: Version
    after: Version

    def folder(self, version: Version, name: str) -> Path:
        return version.home / self.family / name

    def both(self, act: Callable[[Version], Outcome]) -> None:
        """Runs the same in both versions at the same time.

        Raises:
            Skipped: both refuse it with the same words.
            RunError: one fails.
        """
        with ThreadPoolExecutor(2) as pool:
            before, after = pool.map(act, (self.before, self.after))
        if before.code == after.code == 2 and before.errors == after.errors:
            raise Skipped(f"both refuse it: {before.errors[0]}")
        before.check()
        after.check()

    def train(self, version: Version, name: str, words: Sequence[object], processes: int = 1) -> Outcome:
        """finetune_generation.py, with a checkpoint on the way."""
        output = self.folder(version, name)
        common = (
            *("--model_name_or_path", self.model, "--dataset_name_or_path", self.data, "--output_dir", output),
            *("--do_train", "true", "--do_eval", "true", "--src_length", 64, "--max_length", 128),
            *("--logging_steps", 1, "--warmup_steps", 2),
            *("--evaluation_strategy", "steps", "--save_strategy", "steps", "--max_eval_samples", 6),
            *("--per_device_eval_batch_size", 4, "--device", "cpu", "--disable_tqdm", "true", "--report_to", "none"),
        )
        return version.run("finetune_generation.py", [*common, *words], processes=processes)

    def answer(self, version: Version, name: str, words: Sequence[object]) -> Outcome:
        """predictor.py; its answers are in the file that `answers_of` reads."""
        output = self.answers_file(version, name)
        output.parent.mkdir(parents=True, exist_ok=True)
        common = (
            *("--data_file", self.data / "dev.json", "--output_file", output, "--device", "cpu"),
            *("--src_length", 64, "--max_new_tokens", 12, "--min_length", 4),
        )
        return version.run("predictor.py", [*common, *words])

    def answers_file(self, version: Version, name: str) -> Path:
        return self.folder(version, "answers") / f"{name}.json"

    def answers(self, version: Version, name: str) -> Quantities:
        return of_answers(self.answers_file(version, name))


def words_of(method: str, steps: int, saved: int) -> list[object]:
    return [
        *("--max_steps", steps, "--save_steps", saved, "--eval_steps", saved, "--learning_rate", RATES[method]),
        *METHODS[method],
    ]


def train(bench: Bench, method: str) -> Difference:
    """Trains in one process; every figure of every step, and what it leaves."""
    words = [*words_of(method, STEPS, SAVED), "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2]
    bench.both(lambda version: bench.train(version, method, words))
    return compare(*(of_training(bench.folder(version, method)) for version in (bench.before, bench.after)))


def train_in_layout(bench: Bench, layout: str, method: str) -> Difference:
    """Trains in several processes, and lets this version go on from what the one before has saved on the way."""
    processes, rows, micro_batches, options = LAYOUTS[layout]
    sizes = ("--per_device_train_batch_size", rows, "--gradient_accumulation_steps", micro_batches)
    words = [*words_of(method, LAYOUT_STEPS, LAYOUT_SAVED), *sizes, *options]
    name = f"{layout} {method}"
    bench.both(lambda version: bench.train(version, name, words, processes))
    found = compare(*(of_training(bench.folder(version, name)) for version in (bench.before, bench.after)))
    return largest([found, resume(bench, name, LAYOUT_SAVED, words, processes)])


def go_on(bench: Bench, method: str) -> Difference:
    """This version continues an interrupted run of the one before."""
    words = [*words_of(method, STEPS, SAVED), "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2]
    return resume(bench, method, SAVED, words)


def resume(bench: Bench, name: str, step: int, words: Sequence[object], processes: int = 1) -> Difference:
    """This version goes on from a checkpoint of the one before, against what that one made of it."""
    made, continued = bench.folder(bench.before, name), f"{name} continued"
    kept = made / f"checkpoint-{step}"
    if not kept.is_dir():
        raise Skipped(f"the version before has left no {kept.name} to go on from")
    shutil.copytree(kept, bench.folder(bench.after, continued) / kept.name)
    bench.train(bench.after, continued, words, processes).check()
    wanted = of_training(made, after_step=step)
    found = of_training(bench.folder(bench.after, continued), after_step=step)
    return compare(wanted, found).labelled("continued")


def pretrain(bench: Bench) -> Difference:
    """Plain text through both data tools, then new weights from it."""

    def run(version: Version) -> Outcome:
        folder = bench.folder(version, "tokens")
        folder.mkdir(parents=True)
        tools = "data/tools/"
        lines = ("--input_path", bench.data / "text", "--output_path", folder / "text")
        made = version.run(f"{tools}trans_to_json.py", lines)
        if made.code:
            return made
        tokens = ("--input_path", folder / "text.jsonl", "--output_prefix", folder / "tokens" / "text")
        made = version.run(f"{tools}create_pretraining_data.py", ["--model_name", bench.model, *tokens, "--append_eos"])
        if made.code:
            return made
        words = (
            *("--model_name_or_path", bench.model, "--tokenizer_name_or_path", bench.model),
            *("--input_dir", folder / "tokens", "--output_dir", bench.folder(version, "pretrain")),
            *("--do_train", "true", "--do_eval", "true"),
            *("--max_seq_length", 32, "--max_steps", 4, "--eval_steps", 2, "--save_steps", 2, "--split", "8,2,0"),
            *("--per_device_train_batch_size", 2, "--learning_rate", "1e-2", "--min_learning_rate", "1e-3"),
            *("--eval_iters", 2, "--logging_steps", 1, "--device", "cpu", "--disable_tqdm", "true"),
            *("--evaluation_strategy", "steps", "--save_strategy", "steps", "--report_to", "none"),
        )
        return version.run("run_pretrain.py", words)

    bench.both(run)
    return compare(*(of_training(bench.folder(version, "pretrain")) for version in (bench.before, bench.after)))


# --- answers -----------------------------------------------------------------------------------------

FUSED = ("--inference_model", "true")
SAMPLED = ("--top_k", 20, "--top_p", 0.9, "--temperature", 0.8, "--seed", 5)


def trained_model(bench: Bench, version: Version, method: str) -> list[object]:
    """The arguments that name what a version has trained by a method; empty if it has not."""
    folder = bench.folder(version, method)
    if not (folder / "trainer_state.json").is_file():
        return []
    option = {"lora": "--lora_path", "pt": "--prefix_path"}.get(method)
    return ["--model_name_or_path", bench.model, option, folder] if option else ["--model_name_or_path", folder]


def answer_alike(bench: Bench, name: str, words: Callable[[Version], Sequence[object]]) -> Difference:
    bench.both(lambda version: bench.answer(version, name, words(version)))
    return compare(*(bench.answers(version, name) for version in (bench.before, bench.after))).labelled(name)


def answers(bench: Bench, *how: object) -> Difference:
    """The model's answers one by one and together, greedy, drawn and by beams; those of all that was trained."""
    base: list[object] = ["--model_name_or_path", bench.model, *how]
    kind = "fused" if how else "plain"
    ways: dict[str, tuple[object, ...]] = {
        "one by one": ("--batch_size", 1),
        "drawn": ("--batch_size", 4, *SAMPLED),
        "beams": ("--batch_size", 4, "--num_beams", 2),
    }
    found = [answer_alike(bench, f"{kind} {way}", lambda _, words=more: [*base, *words]) for way, more in ways.items()]
    for method in GOES_ON:
        if all(trained_model(bench, version, method) for version in (bench.before, bench.after)):
            found.append(
                answer_alike(
                    bench,
                    f"{kind} after {method}",
                    lambda version, method=method: [*trained_model(bench, version, method), *how, "--batch_size", 4],
                )
            )
    return largest(found)


def old_files(bench: Bench) -> Difference:
    """This version answers with what the one before has trained, and merges its adapter, as that version does."""
    found = []
    for method, how in itertools.product(GOES_ON, ((), FUSED)):
        words, name = trained_model(bench, bench.before, method), f"{'fused' if how else 'plain'} after {method}"
        if not words or not bench.answers_file(bench.before, name).is_file():
            continue
        bench.answer(bench.after, f"{name} of before", [*words, *how, "--batch_size", 4]).check()
        theirs, ours = bench.answers(bench.before, name), bench.answers(bench.after, f"{name} of before")
        found.append(compare(theirs, ours).labelled(f"{name} of before"))
    words = trained_model(bench, bench.before, "lora")
    if words:
        target = "--merge_model_path"
        bench.both(
            lambda version: version.run("merge_lora_params.py", [*words, target, bench.folder(version, "merged")])
        )
        merged = (of_weights(bench.folder(version, "merged")) for version in (bench.before, bench.after))
        found.append(compare(*merged).labelled("merged"))
    if not found:
        raise Skipped("the version before has trained nothing: run this with sft, lora or pt")
    return largest(found)


def exports(bench: Bench, *how: object) -> Difference:
    """Static programs: of both versions, and that of the version before in this one."""
    kind = "fused" if how else "plain"

    def folder(version: Version) -> Path:
        return bench.folder(version, f"export {kind}")

    made = ("--model_name_or_path", bench.model, "--output_path")
    bench.both(lambda version: version.run("export_model.py", [*made, folder(version), *how, "--device", "cpu"]))
    static = ("--mode", "static", *how, "--batch_size", 4, "--model_name_or_path")
    found = [answer_alike(bench, f"{kind} export", lambda version: [*static, folder(version)])]
    bench.answer(bench.after, f"{kind} export of before", [*static, folder(bench.before)]).check()
    theirs, ours = bench.answers(bench.before, f"{kind} export"), bench.answers(bench.after, f"{kind} export of before")
    return largest([*found, compare(theirs, ours).labelled(f"{kind} export of before")])


# --- plan --------------------------------------------------------------------------------------------

Check = Callable[[Bench], Difference]
OTHERS: dict[str, Check] = {
    "pretrain": pretrain,
    "answers": answers,
    "answers fused": lambda bench: answers(bench, *FUSED),
    "old files": old_files,
    "export": exports,
    "export fused": lambda bench: exports(bench, *FUSED),
}
CHOICES = (*METHODS, *OTHERS)


def checks_of(methods: Sequence[str], layouts: Sequence[tuple[str, str]]) -> dict[str, Check]:
    """The checks of a family, in an order in which each finds what it needs."""
    found: dict[str, Check] = {}
    for method in METHODS:
        if method in methods:
            found[method] = lambda bench, method=method: train(bench, method)
            if method in GOES_ON:
                found[f"{method} goes on"] = lambda bench, method=method: go_on(bench, method)
    found |= {name: check for name, check in OTHERS.items() if name in methods}
    for layout, method in layouts:
        found[f"{layout} {method}"] = lambda bench, layout=layout, method=method: train_in_layout(bench, layout, method)
    return found


def cover(families: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """The (layout, method) pairs of each family, by default: all of the first family, some of each other one."""
    for number, _ in enumerate(families):
        if number == 0:
            yield [*((layout, "sft") for layout in (*OF_FAMILIES, *OF_ALL)), *((one, "lora") for one in OF_FAMILIES)]
            continue
        method = ("lora", "sft")[number % 2]
        yield [*((layout, method) for layout in OF_FAMILIES), (OF_ALL[number % len(OF_ALL)], method)]


def write_data(folder: Path) -> None:
    """Rows to train, evaluate and answer, and plain text made of their answers."""
    from tiny_runs import write_rows

    for seed, (split, count) in enumerate({"train": 50, "dev": 6}.items()):
        write_rows(folder / f"{split}.json", count, seed=seed)
    rows = (folder / "train.json").read_text("utf-8").splitlines()
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("\n\n".join(" ".join([json.loads(row)["tgt"]] * 4) for row in rows), "utf-8")
