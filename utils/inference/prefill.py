"""Reading prompts into slots."""

from __future__ import annotations

from collections.abc import Sequence

from utils.inference.engine import Logits
from utils.inference.request import Request, alternatives
from utils.inference.slots import Slots

# Tokens whose logits are on the host at a time: 128 of a vocabulary of 150,000 take 77 MB.
_PIECE = 128


def read_with_logprobs(request: Request, slots: Slots) -> tuple[int, Logits]:
    """Reads a prompt and notes the log-probability of each of its tokens but the first.

    Returns:
        The slot, and the logits [1, vocabulary] after the prompt.
    """
    prompt = request.prompt
    (slot,), logits = slots.open([prompt[:1]])
    for start in range(1, len(prompt), _PIECE):
        part = prompt[start : start + _PIECE]
        _note(request, logits, part[:1])
        logits = slots.advance([slot], [part])
        if len(part) > 1:
            _note(request, logits, part[1:])
            logits = logits.take([len(part) - 1])
    return slot, logits


def _note(request: Request, logits: Logits, tokens: Sequence[int]) -> None:
    """Notes the log-probabilities of tokens; `logits` are those before each of them, and maybe more."""
    for values, token in zip(logits.numpy(), tokens, strict=False):
        own, others = alternatives(values, token, request.options.top_logprobs)
        request.prompt_logprobs.append(own)
        request.prompt_top_logprobs.append(others)
