"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Response, jsonify

from utils.inference.commands import Job
from utils.inference.loading import Prepared
from utils.inference.sampling import Alternatives
from utils.serving import limits
from utils.serving.answering import Answer, Answers, answer, collect
from utils.serving.bodies import read
from utils.serving.context import Served, serving
from utils.serving.errors import ApiError
from utils.serving.openai.logprobs import CompletionLogprobs, scored
from utils.serving.openai.options import ANSWER_TOKENS, answer_budget, grammar_of, sampling_options
from utils.serving.openai.prompts import check_ids, check_length, encode_text, end_ids, kept
from utils.serving.openai.schema import CompletionRequest
from utils.serving.openai.stream import Head, event_stream, usage_of
from utils.serving.openapi import described
from utils.serving.protocol import Ending

routes = Blueprint("completions", __name__)


@dataclass(frozen=True)
class Prompt:
    """A prompt and its text, which the answer may begin with."""

    ids: list[int]
    text: str


class Choice:
    """One answer on its way to the client. The prompt is told with the ending, when its log-probabilities are known,
    or else before all.
    """

    def __init__(self, request: CompletionRequest, prepared: Prepared, prompt: Prompt) -> None:
        self._prompt = prompt
        self._echo = bool(request.echo)
        self._ends = end_ids(prepared, request)
        wanted = request.logprobs is not None
        self._form = CompletionLogprobs(prepared.tokenizer, request.logprobs or 0) if wanted else None
        self._held: list[tuple[int, float | None, Alternatives | None]] = []
        self._text = prompt.text if self._echo else ""

    @property
    def _waits(self) -> bool:
        """Whether nothing can be told before the ending."""
        return self._echo and self._form is not None

    def push(
        self,
        text: str,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        tops: Sequence[Alternatives],
        ending: Ending | None,
    ) -> tuple[str, dict[str, Any] | None]:
        """Adds what is new; returns the text that can be told now with the log-probabilities of its tokens."""
        self._text += text
        if self._form is not None:
            self._held += [one for one in scored(tokens, logprobs, tops) if one[0] not in self._ends]
        if (self._waits and ending is None) or not (self._text or ending):
            return "", None
        if self._waits and ending is not None:
            self._held = [*self._of_prompt(ending), *self._held]
        text, self._text, held, self._held = self._text, "", self._held, []
        if self._form is None:
            return text, None
        return text, self._form.take(*zip(*held, strict=True)) if held else self._form.take((), (), ())

    def _of_prompt(self, ending: Ending) -> list[tuple[int, float | None, Alternatives | None]]:
        first, *others = self._prompt.ids
        return [(first, None, None), *scored(others, ending.prompt_logprobs or (), ending.prompt_top_logprobs or ())]


@routes.post("/v1/completions")
@described(body=CompletionRequest, stream="text/event-stream")
def complete() -> Response:
    """Goes on with one or more prompts."""
    request = read(CompletionRequest)
    served = serving()
    name, prepared = served.model(request.model)
    limit = served.longest(prepared)
    cut_to = kept(request.truncate_prompt_tokens, limit)
    prompts = [_cut(prompt, cut_to, prepared) for prompt in _prompts(request, prepared)]
    for number, prompt in enumerate(prompts):
        check_length(prompt.ids, limit, "prompt" if len(prompts) == 1 else f"prompt.{number}")
    if len(prompts) * request.answers > limits.ANSWERS:
        field = "prompt" if request.answers == 1 else "n"
        each = "1 answer" if request.answers == 1 else f"{request.answers} answers"
        text = f"{field}: {len(prompts)} prompts with {each} each are more than the {limits.ANSWERS} of a request"
        raise ApiError(400, text, param=field)
    jobs = _jobs(request, served, name, prepared, prompts, limit)
    answers = answer(served, jobs)
    head = Head("cmpl", "text_completion", name)
    choices = [Choice(request, prepared, prompts[index // request.answers]) for index in range(len(jobs))]
    if request.stream:
        return event_stream(answers, head, _chunks(answers, choices), request)
    found = [_whole(index, choices[index], one) for index, one in enumerate(collect(answers))]
    return jsonify(head(choices=found, usage=usage_of(answers.usage)))


def _prompts(request: CompletionRequest, prepared: Prepared) -> Iterator[Prompt]:
    """The prompts of a request: a text, ids, or a list of either."""
    given: Any = request.prompt
    single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    if not given and not isinstance(given, str):
        raise ApiError(400, "prompt: is an empty list", param="prompt")
    for number, one in enumerate([given] if single else given):
        field = "prompt" if single else f"prompt.{number}"
        if isinstance(one, str):
            special, begin = request.parse_special, request.add_special_tokens
            yield Prompt(encode_text(prepared, one, field, special=special, begin=begin), one)
        else:
            check_ids(one, prepared, field)
            yield Prompt(one, prepared.tokenizer.decode(one))


def _cut(prompt: Prompt, cut_to: int | None, prepared: Prepared) -> Prompt:
    """The last tokens of a prompt."""
    if cut_to is None or len(prompt.ids) <= cut_to:
        return prompt
    ids = prompt.ids[-cut_to:]
    return Prompt(ids, prepared.tokenizer.decode(ids))


def _jobs(
    request: CompletionRequest, served: Served, name: str, prepared: Prepared, prompts: Sequence[Prompt], limit: int
) -> list[Job]:
    """n jobs for each prompt.

    Raises:
        ApiError: 400, fields that contradict each other or the model.
    """
    tells_prompt = bool(request.echo) and request.logprobs is not None
    if request.max_tokens == 0 and not tells_prompt:
        raise ApiError(400, "max_tokens: expected at least 1; 0 only with echo and logprobs", param="max_tokens")
    grammar = grammar_of(request, prepared)
    jobs = []
    for prompt in prompts:
        left = limit - len(prompt.ids)
        options = sampling_options(
            request,
            prepared,
            budget=answer_budget(request.max_tokens, "max_tokens", ANSWER_TOKENS, left, request),
            grammar=grammar,
            logprobs=request.logprobs is not None,
            top_logprobs=request.logprobs or 0,
            prompt_logprobs=tells_prompt,
        )
        jobs += [Job(name, prompt.ids, options, number, bool(request.stream)) for number in range(request.answers)]
    return jobs


def _whole(index: int, choice: Choice, answer: Answer) -> dict[str, Any]:
    """A complete answer."""
    text, logprobs = choice.push(answer.text, answer.tokens, answer.logprobs, answer.top_logprobs, answer.ending)
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": answer.finish_reason}


def _chunks(answers: Answers, choices: Sequence[Choice]) -> Iterator[dict[str, Any]]:
    """The choices of a stream; the last one of each says how it ended."""
    for index, new in answers:
        text, logprobs = choices[index].push(new.text, new.tokens, new.logprobs, new.top_logprobs, new.ending)
        if text or new.ending is not None:
            reason = None if new.ending is None else new.ending.finish_reason
            yield {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
