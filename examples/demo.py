"""The first thing to run: tunes a real language model on this machine and shows that it answers better.

    make demo                      (or: .venv/bin/python examples/demo.py)

Answers dev questions with the embedded model, tunes it by LoRA on data/train.json, answers again, and
prints perplexity, BLEU-4 and three answers before and after. It only runs the toolchain's own commands
and shows each of them; all files are in checkpoints/demo.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.errors import UserError, run_script  # noqa: E402
from utils.training.metrics import text_metrics  # noqa: E402

MODEL = "smollm2-135m-instruct"
SHOWN = 3


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output_dir", default="./checkpoints/demo", help="where everything goes")
    parser.add_argument("--model", default=MODEL, help="what to tune")
    parser.add_argument("--max_steps", type=int, default=24, help="updates of the LoRA run")
    parser.add_argument("--rows", type=int, default=64, help="dev questions that are answered before and after")
    parser.add_argument("--eval_rows", type=int, default=128, help="dev rows whose perplexity is measured")
    return parser.parse_args()


def run(title: str, *command: str) -> None:
    """Runs one script of the toolchain and lets its output through."""
    print(f"\n==> {title}\n    python {shlex.join(command)}", flush=True)
    started = time.monotonic()
    code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if code:
        raise UserError(f"the command above ended with exit code {code}; its own message says why")
    print(f"    ({time.monotonic() - started:.0f} s)", flush=True)


def predict(title: str, model: str, questions: Path, answers: Path, *more: str) -> list[dict[str, Any]]:
    """Answers a file of questions greedily and returns the rows."""
    answers.unlink(missing_ok=True)
    run(
        title,
        *("predictor.py", "--model_name_or_path", model, *more),
        *("--data_file", str(questions), "--output_file", str(answers)),
        *("--batch_size", "32", "--src_length", "256", "--max_length", "288"),
    )
    return [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]


def bleu(rows: list[dict[str, Any]]) -> float:
    """BLEU-4 of answers, 0 to 100."""
    return 100 * text_metrics([row["output"] for row in rows], [row["tgt"] for row in rows])["bleu4"]


def perplexities(curve: Path) -> tuple[float, float]:
    """Perplexity of the dev rows (before, after) from the loss curve."""
    from math import exp

    with open(curve, newline="", encoding="utf-8") as file:
        losses = [float(row["eval_loss"]) for row in csv.DictReader(file) if row["eval_loss"]]
    return exp(losses[0]), exp(losses[-1])


def main() -> None:
    chosen = options()
    started = time.monotonic()
    folder = Path(chosen.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    questions = folder / "questions.json"
    with open(ROOT / "data" / "dev.json", encoding="utf-8") as dev:
        questions.write_text("".join(islice(dev, chosen.rows)), encoding="utf-8")

    before = predict("the model as it is", chosen.model, questions, folder / "before.json")
    run(
        f"LoRA on data/train.json, {chosen.max_steps} updates",
        *("finetune_generation.py", "./llama/lora_argument.json", "--output_dir", str(folder / "lora")),
        *("--model_name_or_path", chosen.model),
        *("--overwrite_output_dir", "true", "--max_steps", str(chosen.max_steps), "--learning_rate", "1e-3"),
        *("--warmup_steps", "2", "--intokens", "true", "--per_device_train_batch_size", "1"),
        *("--gradient_accumulation_steps", "2", "--per_device_eval_batch_size", "1", "--eval_on_start", "true"),
        *("--evaluation_strategy", "no", "--load_best_model_at_end", "false", "--save_strategy", "no"),
        *("--max_eval_samples", str(chosen.eval_rows)),
    )
    after = predict(
        "the tuned model", chosen.model, questions, folder / "after.json", "--lora_path", str(folder / "lora")
    )

    ppl = perplexities(folder / "lora" / "loss_curve.csv")
    print("\n| dev rows | before | after | change |\n|---|---|---|---|")
    print(f"| perplexity | {ppl[0]:.1f} | {ppl[1]:.1f} | {ppl[1] / ppl[0] - 1:+.0%} |")
    print(f"| BLEU-4 | {bleu(before):.2f} | {bleu(after):.2f} | {bleu(after) - bleu(before):+.2f} |")
    for old, new in list(zip(before, after, strict=True))[:SHOWN]:
        print(f"\nquestion:  {old['src']}\nreference: {old['tgt']}")
        print(f"before:    {old['output']}\nafter:     {new['output']}")
    print(f"\nloss curve: {folder / 'lora' / 'loss_curve.png'}")
    print(
        f"chat with it: python predictor.py --interactive --model_name_or_path {chosen.model} "
        f"--lora_path {folder / 'lora'}"
    )
    print(f"done in {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    run_script(main)
