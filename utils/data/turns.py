"""What a model has to say in a rendered turn, and where that ends."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from utils.data.marks import Rendered
from utils.errors import UserError

if TYPE_CHECKING:
    from utils.data.template import Message
    from utils.families.tokenizers import Tokenizer


def end_turn(
    tokenizer: Tokenizer,
    added: Rendered,
    content_end: int | None,
    *,
    continuation: bool = False,
    only: int | None = None,
) -> tuple[list[int], list[int]]:
    """The ids of an answer up to the one that ends the turn, and the ids behind.

    That is the first special token that the template writes behind the answer's own text. A template that writes
    none gives a model no way to stop: then the tokenizer's end token is added.

    Args:
        added: what the template writes for the answer.
        content_end: where the answer's own text ends in it. If nobody knows, the last special token ends the turn.
        continuation: see `Tokenizer.encode`.
        only: the id that ends the turn, if no other can.
    """
    ids = added.encode(tokenizer, continuation=continuation)
    special = tokenizer.special_ids - {tokenizer.unknown_id}
    if content_end is None:
        found = [place for place, token in enumerate(ids) if token in special][-1:]
    else:
        tokens = {token for token, token_id in tokenizer.written_special.items() if token_id in special}
        written = frozenset(tokenizer.written_special[token] for token in tokens)
        spans = tokenizer.special_spans(added.text)
        meant = [start for start, end in spans if start not in added.plain and added.text[start:end] in tokens]
        within = sum(start < content_end for start in meant)
        found = [place for place, token in enumerate(ids) if token in written][within:]
        if not found and (unwritten := special - written):  # an end token that no text can hold
            first = len(added.cut(0, content_end).encode(tokenizer, continuation=continuation))
            found = [place for place, token in enumerate(ids) if place >= first and token in unwritten]
    if only is not None:
        found = [place for place in found if ids[place] == only] or found
    return (ids[: found[0] + 1], ids[found[0] + 1 :]) if found else ([*ids, tokenizer.eos_id], [])


def own_text_end(added: str, content: str) -> int | None:
    """Where the text of an answer ends in what a template writes for it, if it stands at its beginning."""
    inner, begins = content.strip(), added.lstrip()
    return len(added) - len(begins) + len(inner) if inner and begins.startswith(inner) else None


def opened_thought(message: Message, opened: re.Match[str], origin: str) -> str:
    """What a model has to say to a prompt that ends in an opened tag: the reasoning, then the answer.

    Raises:
        UserError: the answer brings no reasoning, or two.
    """
    tag, content = opened[1], message["content"].strip()
    if f"</{tag}>" in content:
        if message.get("reasoning_content", "").strip() not in content:
            raise UserError(
                f'an answer has one reasoning in its text, before </{tag}>, and another under "reasoning_content"; '
                "keep one"
            )
        begins = content.startswith(f"<{tag}>")
        content = content.removeprefix(f"<{tag}>")
        return content.lstrip("\n") if begins and opened[0].endswith("\n") else content
    if not message.get("reasoning_content"):
        raise UserError(
            f"{origin}: this template asks with an opened <{tag}>, so an answer must begin with its "
            f'reasoning; write "<{tag}>...</{tag}>" before the answer, or the reasoning under '
            f'"reasoning_content", or give a template that does not open <{tag}> with --chat_template'
        )
    reasoning = message["reasoning_content"].strip("\n")
    return f"{reasoning}\n</{tag}>\n\n{content}"
