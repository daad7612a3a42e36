"""From texts, ids and messages of a request to the ids that the model is asked with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from utils.data.encode import encode_source
from utils.data.template import OPENED, ChatTemplate, JinjaTemplate, Message, Tools
from utils.errors import UserError
from utils.families.tokenizers import Tokenizer
from utils.inference.loading import Prepared
from utils.serving import limits
from utils.serving.context import reading
from utils.serving.errors import ApiError
from utils.serving.openai.schema import NO_TOOLS, ChatMessage, Generation, Part, Templated

OWN_VALUES = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token"}
OWN_ROLES = {"developer": "system"}
SHOWN_TOKENS = 8  # of a prompt, where its end is looked at


def vocabulary(prepared: Prepared) -> int:
    """Token ids of the model are below it."""
    return prepared.checkpoint.family.shape(prepared.checkpoint.config).vocabulary


def check_length(ids: Sequence[int], limit: int, field: str, *, answered: bool = True) -> None:
    """
    Args:
        limit: most tokens of prompt and answer together.
        answered: whether there will be an answer, which takes at least one of them.

    Raises:
        ApiError: 400, the prompt is empty, or leaves no room for an answer.
    """
    if not ids:
        raise ApiError(400, f"{field}: the prompt has no tokens", param=field)
    if len(ids) + answered > limit:
        together = " of prompt and answer together" if answered else ""
        raise ApiError(
            400,
            f"{field}: the prompt has {len(ids)} tokens, and this server takes {limit}{together}; "
            "shorten it, or set truncate_prompt_tokens",
            param=field,
            code="context_length_exceeded",
        )


def check_ids(ids: Sequence[int], prepared: Prepared, field: str) -> None:
    """
    Raises:
        ApiError: 400, an id that the model does not know.
    """
    known = vocabulary(prepared)
    wrong = next((token_id for token_id in ids if token_id >= known), None)
    if wrong is not None:
        raise ApiError(400, f"{field}: the token id {wrong} is beyond the model's {known} tokens", param=field)


def kept(asked: int | None, limit: int) -> int | None:
    """To how many tokens a prompt is cut; None leaves it as it is."""
    if asked is None:
        return None
    return limit - 1 if asked == -1 else max(1, min(asked, limit - 1))


def encode_text(prepared: Prepared, text: str, field: str, *, special: bool | None, begin: bool | None) -> list[int]:
    """The ids of a text without a template.

    Args:
        special: whether special tokens written in it are special; None as the server was told.
        begin: whether the begin token comes first; None as the tokenizer does it.

    Raises:
        ApiError: 400, a text that the tokenizer cannot take.
    """
    tokenizer = prepared.tokenizer
    special = prepared.template.special_tokens_in_text if special is None else special
    begin = tokenizer.adds_bos if begin is None else begin
    first = [tokenizer.bos_id] if begin and tokenizer.bos_id is not None else []
    with reading(field):
        return first + (tokenizer.encode(text) if special else tokenizer.encode_text(text))


class Asked:
    """A conversation that the model is asked with.

    Attributes:
        template: with the values of the request.
        messages, tools: as the template gets them.
    """

    def __init__(self, prepared: Prepared, request: Templated, messages: Sequence[ChatMessage], tools: Tools | None):
        """
        Raises:
            ApiError: 400, what this model's template cannot be given.
        """
        self.tokenizer = prepared.tokenizer
        self.template = _with_values(prepared.template, request)
        self.tools = tools
        self._continue = bool(request.continue_final_message)
        self._ask = request.add_generation_prompt is not False and not self._continue
        if len(messages) > limits.MESSAGES:
            raise ApiError(400, f"messages: at most {limits.MESSAGES} are taken", param="messages")
        known = self.template.known_keys(self.tokenizer)
        if tools and "tools" not in known:
            raise ApiError(400, NO_TOOLS, param="tools")
        self.messages = [_message(one, f"messages.{place}", known) for place, one in enumerate(messages)]
        self._check_order()

    def ids(self, cut_to: int | None) -> list[int]:
        """The ids of the prompt.

        Args:
            cut_to: most tokens; the oldest rounds go first, then the end of the last message.

        Raises:
            ApiError: 400, the template refuses the conversation, or itself writes more than `cut_to`.
        """
        with reading("messages"):
            if not self._ask:
                ids, _ = self.template.encode_conversation(self.tokenizer, self.messages, self.tools)
                ids = ids[:-1] if self._continue else ids
                return ids if cut_to is None else ids[-cut_to:]
            ids = self.template.encode_prompt(self.tokenizer, self.messages, self.tools)
        if cut_to is None or len(ids) <= cut_to:
            return ids
        try:
            return encode_source(self.messages, self.tokenizer, self.template, cut_to, self.tools)[0]
        except UserError:
            text = (
                f"truncate_prompt_tokens: {cut_to} tokens have no room for what the chat template itself writes; "
                "set it higher"
            )
            raise ApiError(400, text, param="truncate_prompt_tokens") from None

    def opened_tag(self, ids: Sequence[int]) -> str | None:
        """The tag of a reasoning that the prompt has begun, such as "think"."""
        found = OPENED.search(self.tokenizer.decode(ids[-SHOWN_TOKENS:], skip_special=False))
        return None if found is None else found[1]

    def _check_order(self) -> None:
        answered = self.messages[-1]["role"] == "assistant"
        if answered and self._ask:
            text = "messages: the last one is the assistant's; set continue_final_message to go on with it"
            raise ApiError(400, text, param="messages")
        if not answered and not self._ask:
            field = "continue_final_message" if self._continue else "add_generation_prompt"
            raise ApiError(400, f"{field}: the last message must be the assistant's", param=field)


def _with_values(template: ChatTemplate, request: Templated) -> ChatTemplate:
    """The template with what the request gives it beside the conversation.

    Raises:
        ApiError: 400, values that no template or not this one can have.
    """
    values = dict(request.chat_template_kwargs or {})
    if own := OWN_VALUES & values.keys():
        text = f"chat_template_kwargs: {', '.join(sorted(own))}: the server sets this itself"
        raise ApiError(400, text, param="chat_template_kwargs")
    if values and not isinstance(template, JinjaTemplate):
        text = "chat_template_kwargs: the chat template of this model takes no values"
        raise ApiError(400, text, param="chat_template_kwargs")
    if request.reasoning_effort is not None:
        if not isinstance(template, JinjaTemplate) or "reasoning_effort" not in template.text:
            text = "reasoning_effort: the chat template of this model does not know it"
            raise ApiError(400, text, param="reasoning_effort")
        values.setdefault("reasoning_effort", request.reasoning_effort)
    return template.with_values(values) if values and isinstance(template, JinjaTemplate) else template


def _message(given: ChatMessage, place: str, known: frozenset[str]) -> Message:
    """A message as templates take it.

    Raises:
        ApiError: 400, parts that are no text, or what the template would leave out.
    """
    message: Message = {"role": OWN_ROLES.get(given.role, given.role), "content": _text(given.content, place)}
    if given.content is None and not given.tool_calls:
        raise ApiError(400, f"{place}.content: is missing", param=f"{place}.content")
    if given.tool_calls:
        if given.role != "assistant":
            text = f"{place}.tool_calls: only the assistant calls functions"
            raise ApiError(400, text, param=f"{place}.tool_calls")
        if "tool_calls" not in known:
            text = f"{place}.tool_calls: the chat template of this model does not know calls of functions"
            raise ApiError(400, text, param=f"{place}.tool_calls")
        message["tool_calls"] = [
            {"type": "function", **call.model_dump(exclude_unset=True)} for call in given.tool_calls
        ]
    if given.role == "tool" and not known & {"tools", "tool_calls"}:
        text = f"{place}.role: the chat template of this model does not know the role tool"
        raise ApiError(400, text, param=f"{place}.role")
    if given.reasoning_content and given.role == "assistant":
        message["reasoning_content"] = given.reasoning_content
    if given.name is not None:
        message["name"] = given.name
    if given.tool_call_id is not None:
        message["tool_call_id"] = given.tool_call_id
    return message


def _text(content: str | list[Part] | None, place: str) -> str:
    """
    Raises:
        ApiError: 400, a part that is no text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for number, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        field = f"{place}.content.{number}"
        if part.type not in ("text", "refusal"):
            text = f"{field}.type: this model takes text only, found {part.type!r:.60}"
            raise ApiError(400, text, param=f"{field}.type")
        if text is None:
            raise ApiError(400, f"{field}.{part.type}: is missing", param=f"{field}.{part.type}")
        texts.append(text)
    return "".join(texts)


def end_ids(prepared: Prepared, request: Generation) -> frozenset[int]:
    """Tokens that end an answer and are no part of its text."""
    own = () if request.ignore_eos else _stop_ids(prepared.template, prepared.tokenizer)
    return frozenset([*own, *(request.stop_token_ids or ())])


@lru_cache(maxsize=64)
def _stop_ids(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
    """See `ChatTemplate.stop_ids`, which renders an example."""
    return template.stop_ids(tokenizer)
