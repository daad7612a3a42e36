"""What the process of the model says to the HTTP side, whose commands are those of `utils.inference.commands`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from utils.inference.sampling import Alternatives


@dataclass(frozen=True)
class Ending:
    """How an answer ended.

    Attributes:
        finish_reason: "stop", "length", or "error".
        prompt_tokens, cached_tokens: of the prompt, and how many of them were not read again.
        completion_tokens: generated tokens, the end token included.
        error: why there is no (whole) answer, with finish_reason "error".
        retry_after: seconds after which the same request may be answered, if the error is none of its own.
        prompt_logprobs, prompt_top_logprobs: of each token of the prompt but the first, when asked for.
    """

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    error: str | None = None
    retry_after: int | None = None
    prompt_logprobs: tuple[float, ...] | None = None
    prompt_top_logprobs: tuple[Alternatives, ...] | None = None


@dataclass(frozen=True)
class Update:
    """News of a job. The first one says that its prompt is being read (`opened`); the last one has an `ending`.

    Attributes:
        opened: it waits no longer.
        text: new text: whole characters, nothing that may turn out to be a stop word. The texts of all updates
            join to the answer. All of it comes with the ending if the job does not stream.
        tokens: new tokens.
        logprobs, top_logprobs: of these tokens, if asked for.
        ending: the answer is complete; the last update.
        vectors: float32 [prompts, hidden] of an `EmbedJob`, with its ending.
    """

    opened: bool = False
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[Alternatives, ...] = ()
    ending: Ending | None = None
    vectors: NDArray[np.float32] | None = None
