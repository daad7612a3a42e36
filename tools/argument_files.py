"""Keeps the argument files of all families in step: each is that of one family, but for what a family decides itself.

    python tools/argument_files.py                                # writes the files of all families anew
    python tools/argument_files.py --add qwen3 --model Qwen/Qwen3-8B  # those of a new family, whose folder it makes

Change a value in the files of `PATTERN` and run it. Values are copied as they are written.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.families import FAMILIES  # noqa: E402

PATTERN = "mistral"
METHODS = ("sft", "lora", "pt", "ptq", "gptq", "pretrain")
# of a family: which model, on what data, how much of it at once and in which type
NAMES = ("model_name_or_path", "tokenizer_name_or_path", "output_dir", "dataset_name_or_path")
OWN = {*NAMES, "src_length", "max_length", "max_seq_length", "num_train_epochs", "recompute", "sharding"}
OWN |= {"bf16", "fp16", "tensor_parallel_degree"}


def entries(text: str) -> dict[str, str]:
    """The keys of a flat JSON object and their values, as they are written."""
    return dict(re.findall(r'^    "(\w+)": (.*?),?$', text, flags=re.MULTILINE))


def in_step(pattern: str, own: str) -> str:
    """The text of a family's file: its keys and values are the pattern's where the family does not decide."""
    wanted, found = entries(pattern), entries(own)
    kept = {name: found.get(name) if name in OWN else value for name, value in wanted.items()}
    for place, name in enumerate(found):
        if name in OWN and name not in wanted:  # behind the key that stands before it
            before = list(found)[place - 1]
            at = list(kept).index(before) + 1 if before in kept else len(kept)
            kept = dict([*list(kept.items())[:at], (name, found[name]), *list(kept.items())[at:]])
    lines = [f'    "{name}": {value}' for name, value in kept.items() if value is not None]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def first(pattern: str, family: str, model: str) -> str:
    """The text of a new family's file."""
    text = re.sub(r'(?<=_name_or_path": )"(?!\./).*?"', f'"{model}"', pattern)
    return text.replace(f"/{PATTERN}_", f"/{family}_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", metavar="NAME", help="the short name of a new family")
    parser.add_argument("--model", help="what its files name as model_name_or_path")
    given = parser.parse_args()
    if bool(given.add) != bool(given.model):
        parser.error("--add and --model belong together")
    for family in [given.add] if given.add else FAMILIES:
        (ROOT / family).mkdir(exist_ok=True)
        for method in METHODS:
            pattern = (ROOT / PATTERN / f"{method}_argument.json").read_text("utf-8")
            path = ROOT / family / f"{method}_argument.json"
            text = first(pattern, family, given.model) if given.add else in_step(pattern, path.read_text("utf-8"))
            path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
