"""From prompts to answers, above any engine: all prompts of a list, or one as a stream."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from collections.abc import Generator as PythonGenerator
from contextlib import closing
from functools import partial

from utils.inference.commands import Job, Submit
from utils.inference.constraint import Constraint
from utils.inference.engine import Engine
from utils.inference.grammar import Grammar
from utils.inference.request import Completion
from utils.inference.sampling import SamplingOptions
from utils.inference.scheduler import Decoder, Event, Scheduler, Speed
from utils.inference.service import Service

__all__ = ["Completion", "Decoder", "Generator", "Speed"]


class Generator:
    """Generates answers with an engine and a tokenizer.

    Attributes:
        speed: figures over all calls; assign `Speed()` to start anew.
        share_prefixes: read what prompts have in common once, if the engine can copy it.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Decoder,
        end_ids: Collection[int] | None = None,
        constrain: Callable[[Grammar], Constraint] | None = None,
    ) -> None:
        """
        Args:
            engine: whose slots may also be in use by others.
            tokenizer: of the engine's model.
            end_ids: tokens that end an answer; None takes the tokenizer's.
            constrain: see `Scheduler`.
        """
        self.engine = engine
        self.speed = Speed()
        self.share_prefixes = True
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._constrain = constrain

    def scheduler(
        self, batch_size: int = 8, prefill_chunk: int | None = None, prompt_cache_bytes: int = 0
    ) -> Scheduler:
        """A scheduler for requests that come one by one, see there; the caller closes it."""
        return Scheduler(
            self.engine,
            self._tokenizer,
            self._end_ids,
            batch_size,
            speed=self.speed,
            share_prefixes=self.share_prefixes,
            prefill_chunk=prefill_chunk,
            prompt_cache_bytes=prompt_cache_bytes,
            constrain=self._constrain,
        )

    def service(self, batch_size: int) -> Service:
        """A service of this one model, whose name is ""; the caller closes it."""
        return Service({"": partial(self.scheduler, batch_size)})

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions | Sequence[SamplingOptions],
        batch_size: int = 8,
        on_row: Callable[[int, Completion], None] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Answers every prompt, the longest first; when one answer is complete, the next prompt joins.

        A prompt that cannot be answered (empty, too long for the model's positions, unknown ids) gives
        a completion with an error, and the others go on.

        Args:
            prompts: token ids.
            options: for all prompts, or one per prompt.
            batch_size: most slots that work at a time; it does not change the answers.
            on_row: called with (index in `prompts`, completion) as soon as each answer is ready.
            numbers: what the random numbers of each prompt depend on beside the seed; default its index.

        Returns:
            One completion per prompt, in the order of `prompts`.
        """
        each = [options] * len(prompts) if isinstance(options, SamplingOptions) else list(options)
        if len(each) != len(prompts) or (numbers is not None and len(numbers) != len(prompts)):
            raise ValueError("options and numbers must be as many as the prompts")
        done: dict[int, Completion] = {}
        with closing(self.service(batch_size)) as service:  # frees all slots even if `on_row` raises
            # longest first: too little memory shows at once
            for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
                number = index if numbers is None else numbers[index]
                service.post(Submit(index, Job("", prompts[index], each[index], number)))
            while service.busy:
                for index, event in _events(service):
                    if event.completion is not None:
                        done[index] = event.completion
                        if on_row is not None:
                            on_row(index, event.completion)
        return [done[index] for index in range(len(prompts))]

    def stream(
        self, prompt: Sequence[int], options: SamplingOptions, number: int = 0
    ) -> PythonGenerator[str, None, Completion]:
        """Answers one prompt piece by piece; a piece is never empty and holds whole characters only.

        The completion is what the generator returns (`completion = yield from ...`). Closing it early
        frees the slot.
        """
        completion: Completion | None = None
        with closing(self.service(1)) as service:
            service.post(Submit(0, Job("", prompt, options, number, stream=True)))
            while completion is None:
                for _, event in _events(service):
                    completion = event.completion
                    if event.text:
                        yield event.text
        return completion


def _events(service: Service) -> list[tuple[int, Event]]:
    """What the next turn brings: (key, event)."""
    return [(news.key, news.event) for news in service.turn() if news.event is not None]
