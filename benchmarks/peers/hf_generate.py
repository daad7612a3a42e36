"""The peer of benchmarks/inference.py: Hugging Face transformers, float32, on the CPU.

    python hf_generate.py --model FOLDER --work WORK.json

Runs in an environment of its own, which holds PyTorch and nothing of this toolchain, and answers commands as
inference_protocol.py says.
The loop over `past_key_values` is written out, because it is faster than `model.generate` (by 5 to 15 % for this
model): same forward passes, without generate's bookkeeping. What else makes it fast: scaled-dot-product
attention, logits of the last token only, inference mode, no mask at all where no row is padded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

sys.path.append(str(Path(__file__).resolve().parent.parent))

import inference_protocol as protocol
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


class Peer:
    """A model and its greedy loop."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        self.model.eval()
        self.pad_id = self.tokenizer.pad_token_id or 0

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[list[list[int]], float, float]:
        """(greedy ids of each prompt, seconds until the first tokens, seconds of all further tokens).

        An end token does not end an answer, so that all have the same length.
        """
        started = time.perf_counter()
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        inputs: dict[str, Any] = {"past_key_values": DynamicCache(config=self.model.config)}
        if any(len(prompt) < width for prompt in prompts):
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        chosen = [self._step(ids, inputs)]
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            if "attention_mask" in inputs:
                inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(chosen[-1])], dim=1)
                inputs["position_ids"] = inputs["position_ids"][:, -1:] + 1
            chosen.append(self._step(chosen[-1], inputs))
        found = torch.cat(chosen, dim=1).tolist()
        return found, first - started, time.perf_counter() - first

    def _step(self, ids: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        logits = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **inputs).logits
        return logits[:, -1].argmax(dim=-1, keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Greedy generation with Hugging Face transformers, timed.")
    parser.add_argument("--model", type=Path, required=True, help="a folder in Hugging Face's layout")
    parser.add_argument("--work", type=Path, required=True, help="the prompts, written by benchmarks/inference.py")
    chosen = parser.parse_args()
    work = json.loads(chosen.work.read_text(encoding="utf-8"))
    answers = protocol.open_answers()
    torch.set_num_threads(work["threads"])
    started = time.perf_counter()
    peer = Peer(chosen.model)
    loaded = time.perf_counter() - started
    peer.tokenizer.decode(peer.generate([work["first"]], 1)[0][0])
    first_token_at = time.monotonic()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    protocol.say(answers, {"first_token_at": first_token_at, "load": loaded, "versions": versions})
    protocol.serve(answers, peer.generate, work)


if __name__ == "__main__":
    main()
