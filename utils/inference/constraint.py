"""Answers of a given form: which tokens may come next."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Collection
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from utils.errors import UserError
from utils.inference.digits import DigitRun, DigitTokens
from utils.inference.grammar import JSON_BLANKS, JSON_KINDS, Grammar, Kind

if TYPE_CHECKING:
    from utils.families.tokenizers import Tokenizer

MOST_CHARACTERS = 65_536  # of the text of a grammar
MOST_OF_CHOICE = 4096  # characters: the longer one text is, the longer takes each step of it
_KEPT = 32  # forms that are ready for the next answer
_NAMES: dict[Kind, str] = {
    "json_object": "the JSON object",
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "choice": "the list of choices",
    "lark": "the grammar",
    "calls": "the form of calls",
}
# Work and memory of one form: a step takes some ten milliseconds at most, its automaton about 40 MB.
_LIMITS: dict[str, Any] = {"step_lexer_fuel": 50_000, "max_lexer_states": 20_000, "verbose_errors": False}
_TRIAL = Path(__file__).with_name("constraint_trial.py")
_TRIAL_SECONDS = 60.0  # for a machine that is busy: the trial limits its own processor time
_trials = threading.BoundedSemaphore(2)


class Constraint(Protocol):
    """The form of one answer in the making."""

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and nothing may follow, so that it ends here, whatever the model would say."""

    def mask(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool [vocabulary of the logits]; end tokens among them where it may end here.

        At least one token may come.

        Raises:
            UserError: the form takes too much work at this place, or the model has no token that fits.
        """

    def accept(self, token: int) -> None:
        """Adds a token that `mask` allows, an end token too."""


class Constrainer:
    """Begins answers of a form for one tokenizer. Special tokens are in none, unless a grammar names their ids."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, end_ids: Collection[int]) -> None:
        """
        Args:
            tokenizer: of the model.
            vocabulary: of the logits; it may be larger than the tokenizer's.
            end_ids: tokens that end an answer.
        """
        self._tokenizer, self._vocabulary, self._end_ids = tokenizer, vocabulary, frozenset(end_ids)
        self._ready = lru_cache(maxsize=_KEPT)(self._compile)

    def warm_up(self) -> None:
        """Does now what the first answer would wait for: up to a second for a large vocabulary."""
        _ = self._words

    def start(self, grammar: Grammar) -> Constraint:
        """The form of an answer that begins.

        Raises:
            UserError: see `check`, which finds the same, and more, before an answer is asked for.
        """
        run = DigitRun() if grammar.kind in JSON_KINDS else None
        return _Walk(self._ready(grammar).deep_copy(), self._words, self._end_ids, run)

    @cached_property
    def _words(self) -> _Vocabulary:
        return _Vocabulary(self._tokenizer, self._vocabulary, self._end_ids)

    def _compile(self, grammar: Grammar) -> Any:
        import llguidance

        limits = llguidance.LLParserLimits(**_LIMITS)
        text = _compilable(grammar, drops_blank=self._words.drops_blank)
        matcher = llguidance.LLMatcher(self._words.built, text, log_level=0, limits=limits)
        if matcher.is_error():
            raise UserError(_fault(grammar, matcher.get_error()))
        return matcher


class _Vocabulary:
    """A tokenizer as the library asks for it.

    Attributes:
        tokens: the bytes of each id of the logits. Special ones have a name that is no text, each its own.
        digits: with which they begin.
        built: the library's tokenizer.
        drops_blank: whether the blank before the first token of a text is no part of it.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, end_ids: Collection[int]) -> None:
        import llguidance

        from utils.families.token_bytes import token_bytes

        special = tokenizer.special_ids | set(end_ids)
        texts = [b"" if place in special else token_bytes(tokenizer, place) for place in range(vocabulary)]
        self.drops_blank = _drops_blank(tokenizer, texts)
        for place in _lone_blanks(tokenizer, texts) if self.drops_blank else ():
            texts[place] = b""
        self.special_token_ids = [place for place, text in enumerate(texts) if not text]
        self.tokens = [text or b"<|%d|>" % place for place, text in enumerate(texts)]
        self.digits = DigitTokens(self.tokens)
        self.eos_token_id = min(end_ids)
        self._tokenizer = tokenizer
        self.built: Any = None
        self.built = llguidance.LLTokenizer(llguidance.TokenizerWrapper(self), eos_token=sorted(end_ids))

    def __call__(self, text: bytes | str) -> list[int]:
        """The tokens that the model itself would write for a text, or others that make it."""
        text = text.decode() if isinstance(text, bytes) else text
        ids = self._tokenizer.encode_text(text, continuation=True)
        if b"".join(self.tokens[token] for token in ids if token < len(self.tokens)) == text.encode():
            return ids
        return self.built.greedy_tokenize(text) if self.built is not None else []


class _Walk:
    """A `Constraint` that walks through a grammar; numbers of JSON end where they get too long, if they can."""

    def __init__(self, matcher: Any, words: _Vocabulary, end_ids: frozenset[int], run: DigitRun | None) -> None:
        """
        Args:
            matcher: at the beginning of the grammar.
            run: of digits, in an answer that is JSON.
        """
        self._matcher, self._words, self._end_ids, self._run = matcher, words, end_ids, run
        self._said_end = False

    @property
    def ended(self) -> bool:
        return self._said_end or (self._matcher.is_stopped() and not self._matcher.is_error())

    def mask(self) -> NDArray[np.bool_]:
        allowed = self._allowed(self._matcher)
        if self._matcher.is_error() or not allowed.any():
            said = _line(self._matcher.get_error())
            raise UserError(
                "the answer cannot go on in its form, which takes too much work or signs that the model's tokens lack"
                + (f" ({said})" if said else "")
            )
        if self._run is not None and self._run.room < self._words.digits.most:
            return self._ending_number(allowed, self._run.room)
        return allowed

    def accept(self, token: int) -> None:
        if token in self._end_ids:
            self._said_end = True
            return
        self._matcher.consume_token(token)  # what fails here, the next mask tells
        if self._run is not None:
            self._run.add(self._words.tokens[token])

    def _allowed(self, matcher: Any) -> NDArray[np.bool_]:
        """Which tokens a matcher allows."""
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, count=len(self._words.tokens), bitorder="little").view(np.bool_)

    def _ending_number(self, allowed: NDArray[np.bool_], room: int) -> NDArray[np.bool_]:
        """Of these tokens those that bring no more digits than there is room for; if there are none, digits behind
        which the number can end; else all."""
        digits = self._words.digits
        rest: NDArray[np.bool_] = allowed & (digits.leading <= max(room, 0))
        if not rest.any():  # as in 0.000, which must be more than 0
            rest[[token for token in digits.single if allowed[token] and self._may_end(token)]] = True
        return rest if rest.any() else allowed

    def _may_end(self, digit: int) -> bool:
        """Whether a number may end behind one more digit."""
        after = self._matcher.deep_copy()
        after.consume_token(digit)
        return bool((self._allowed(after) & (self._words.digits.leading == 0)).any())


def check(grammar: Grammar, vocabulary: int | None = None) -> None:
    """Finds out whether answers of a form can be made, in bounded time and memory whatever it says.

    Args:
        vocabulary: of the logits; the token ids that a grammar names are below it. None leaves them unchecked.

    Raises:
        UserError: one sentence.
    """
    if (fault := _checked(grammar, vocabulary if grammar.kind == "lark" else None)) is not None:
        raise UserError(fault)


@lru_cache(maxsize=256)
def _checked(grammar: Grammar, vocabulary: int | None) -> str | None:
    """What is wrong with a form, as a process of its own finds it: the library may take long for a hostile one, or
    crash."""
    try:
        text = _compilable(grammar)
    except UserError as error:
        return str(error)
    trial = json.dumps({"grammar": text, "limits": _LIMITS, "vocabulary": vocabulary})
    command = [sys.executable, "-P", str(_TRIAL)]
    with _trials:
        try:
            done = subprocess.run(command, input=trial.encode(), capture_output=True, timeout=_TRIAL_SECONDS)
        except subprocess.TimeoutExpired:
            return _too_much(grammar)
    if done.returncode != 0:
        return _too_much(grammar)
    fault = done.stdout.decode(errors="replace")
    return _fault(grammar, fault) if fault else None


def _compilable(grammar: Grammar, *, drops_blank: bool = False) -> str:
    """A form in the library's own words.

    Args:
        drops_blank: whether the blank before the first token of a text is no part of it.

    Raises:
        UserError: it is too long, or no JSON.
    """
    text = grammar.text
    if len(text) > MOST_CHARACTERS:
        raise UserError(
            f"{_NAMES[grammar.kind]} has {len(text)} characters: expected at most {MOST_CHARACTERS}; shorten it"
        )
    form: dict[str, Any] = {"name": "form"}
    blank = '" "?'
    if grammar.kind in ("json_object", "json_schema"):
        schema = {"type": "object"} if grammar.kind == "json_object" else _parsed(grammar)
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        if not isinstance(schema, dict):
            raise UserError(_fault(grammar, "it is neither an object nor true"))
        form["json_schema"] = {**schema, "x-guidance": JSON_BLANKS}
    elif grammar.kind in ("lark", "calls"):
        form["lark_grammar"] = text
    else:
        blank = '" "'
        if grammar.kind == "regex":
            form["lark_grammar"] = f"start: WHOLE\nWHOLE: /{_in_slashes(text)}/"
        else:
            choices = _parsed(grammar)
            if not (isinstance(choices, list) and choices and all(isinstance(one, str) and one for one in choices)):
                raise UserError(_fault(grammar, "it is no list of texts that are not empty"))
            if (longest := max(map(len, choices))) > MOST_OF_CHOICE:
                said = f"one has {longest} characters, and at most {MOST_OF_CHOICE} are taken"
                raise UserError(_fault(grammar, said))
            form["lark_grammar"] = "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in choices)
    first = [{"name": "answer", "lark_grammar": f"start: {blank} @form"}] if drops_blank else []
    try:
        return json.dumps({"grammars": [*first, form]})
    except RecursionError:
        raise UserError(_fault(grammar, "it is too deep")) from None


def _parsed(grammar: Grammar) -> Any:
    try:
        return json.loads(grammar.text)
    except (ValueError, RecursionError):
        raise UserError(_fault(grammar, "it is no JSON, or too deep")) from None


def _in_slashes(regex: str) -> str:
    """A regular expression as it stands between slashes, which no other slash may end."""
    escaped, after = "", False
    for sign in regex:
        escaped += "\\/" if sign == "/" and not after else "\\n" if sign == "\n" else sign
        after = sign == "\\" and not after
    return escaped


def _fault(grammar: Grammar, message: str) -> str:
    return f"{_NAMES[grammar.kind]} cannot be followed: {_line(message)}"


def _too_much(grammar: Grammar) -> str:
    return (
        f"{_NAMES[grammar.kind]} takes too much work; make it simpler: fewer alternatives, references and patterns, "
        "smaller numbers"
    )


def _line(message: str) -> str:
    """The beginning of what the library says, on one line, without the lines of the grammar that it shows."""
    text = " ".join(re.sub(r"<non-verbose/>|(?m:^\s*\d+ \| .*$)", "", message).split()).rstrip(" ^")
    text = "nothing fits it" if text == "NoExtensionBias" else text
    return text if len(text) <= 200 else text[:200] + "..."


def _drops_blank(tokenizer: Tokenizer, texts: list[bytes]) -> bool:
    """Whether the blank before the first token of a text is no part of it."""
    words = (place for place, text in enumerate(texts) if text[:1] == b" " and text[1:].isalpha())
    first = next(words, None)
    return first is not None and not tokenizer.decode([first]).startswith(" ")


def _lone_blanks(tokenizer: Tokenizer, texts: list[bytes]) -> list[int]:
    """Blanks that stay at the beginning of a text although others do not: the byte of that number."""
    anchor = next(place for place, text in enumerate(texts) if text.isalpha())
    blanks = [place for place, text in enumerate(texts) if text == b" "]
    return [place for place in blanks if tokenizer.decode([place, anchor]).startswith(" ")]
