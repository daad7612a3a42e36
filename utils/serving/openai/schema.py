"""What requests may say. Types are strict, as OpenAI's are; null is the same as a field left out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from utils.serving import bodies, limits
from utils.serving.errors import ApiError

MOST_STOP_WORDS = 16
NO_TOOLS = (
    "tools: the chat template of this model does not know tools; the server's --chat_template can name one that does"
)

# Of requests for answers: fields that are known and cannot be served, with the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "grammar": ("",),
    "service_tier": ("auto", "default"),
    "suffix": ("",),
}
_REFUSED_OF_CHATS: dict[str, tuple[Any, ...]] = {
    **_REFUSED,
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "moderation": (),
    "web_search_options": (),
    "store": (False,),
    "verbosity": ("medium",),
    "echo": (False,),
    "documents": ([],),
    "chat_template": (),
    "mm_processor_kwargs": (),
}

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopWord = Annotated[str, Field(min_length=1, max_length=limits.STOP_CHARACTERS)]


class Request(bodies.Body):
    """A body, or a part of one."""

    model_config = ConfigDict(allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _said(cls, value: Any) -> Any:
        """Leaves out what is null, and refuses what cannot be served.

        Raises:
            ApiError: 400, naming the field.
        """
        if not isinstance(value, dict):
            return value
        for name, harmless in cls.refused().items():
            asked = value.get(name)
            if asked is not None and not any(type(asked) is type(one) and asked == one for one in harmless):
                text = f"{name}: this server cannot do that; leave the field out"
                raise ApiError(400, text, param=name, code="unsupported_parameter")
        return {name: given for name, given in value.items() if given is not None}


class Open(Request):
    """A part of a request that reaches the chat template as the client wrote it."""

    model_config = ConfigDict(extra="allow")


class StreamOptions(Request):
    include_usage: bool | None = Field(None, description="end the stream with a chunk that has the usage")
    continuous_usage_stats: bool | None = Field(None, description="give every chunk the usage so far")


class JsonSchema(Request):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Request):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="of json_object, as llama.cpp has it")


class StructuredOutputs(Request):
    """The form of an answer, as newer versions of vLLM name it."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="a JSON schema")
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None


class Generation(Request):
    """What requests for answers have in common."""

    model: str | None = Field(None, description="a name of /v1/models; the first of them if left out")
    stream: bool | None = Field(None, description="send the answer in pieces, as server-sent events")
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=limits.ANSWERS, description="answers to each prompt")
    seed: int | None = Field(None, ge=-(2**63), lt=2**64, description="the same seed gives the same answer")
    stop: StopWord | Annotated[list[StopWord], Field(max_length=MOST_STOP_WORDS)] | None = Field(
        None, description="texts that end the answer and are no part of it"
    )
    temperature: float | None = Field(None, ge=0, le=2, description="1 if left out; 0 is greedy")
    top_p: float | None = Field(None, ge=0, le=1, description="1 if left out")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=limits.NAMED_TOKENS, description="what is added to the logits of tokens, by their ids"
    )
    top_k: int | None = Field(None, ge=-1, description="-1 and 0 keep all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=1e-6, le=1000, description="1 is off")
    min_tokens: int | None = Field(None, ge=0, description="tokens before the answer may end")
    stop_token_ids: list[TokenId] | None = Field(
        None, max_length=limits.NAMED_TOKENS, description="more tokens that end the answer"
    )
    ignore_eos: bool | None = Field(None, description="the model's end tokens do not end the answer")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="cut the prompt to so many tokens; -1 to what the server takes"
    )
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = Field(None, description="a JSON schema of the answer")
    guided_regex: str | None = Field(None, description="a regular expression that the answer matches")
    guided_grammar: str | None = Field(None, description="a grammar of the answer in llguidance's form of Lark")
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = Field(None, description="all possible answers")
    structured_outputs: StructuredOutputs | None = Field(None, description="the same four in one object")
    best_of: int | None = Field(None, description="only the same as n")
    user: Any = Field(None, description="of the client's own; it changes nothing, as the next ones")
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None

    @property
    def answers(self) -> int:
        """How many answers each prompt gets."""
        return 1 if self.n is None else self.n


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]] = Field(
        description="a text, its token ids, or a list of either"
    )
    max_tokens: int | None = Field(None, ge=0, description="16 if left out; 0 only with echo and logprobs")
    echo: bool | None = Field(None, description="begin the text with the prompt")
    logprobs: int | None = Field(
        None, ge=0, le=limits.TOP_LOGPROBS, description="so many likeliest tokens at each place"
    )
    parse_special: bool | None = Field(None, description="special tokens written in the prompt are special")
    add_special_tokens: bool | None = Field(None, description="put the begin token of the tokenizer before a text")

    @classmethod
    def refused(cls) -> dict[str, tuple[Any, ...]]:
        return _REFUSED


class Part(Request):
    """A part of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Open):
    name: str
    arguments: str | dict[str, Any]


class ToolCall(Open):
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessage(Request):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class FunctionTool(Open):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Open):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Request):
    name: str


class NamedTool(Request):
    type: Literal["function"]
    function: NamedFunction


class Templated(Request):
    """What a chat template is given beside the messages."""

    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="more values for the chat template")
    add_generation_prompt: bool | None = Field(None, description="false only behind an assistant's message")
    continue_final_message: bool | None = Field(None, description="go on with the last message, an assistant's")
    reasoning_effort: str | None = Field(None, description="for templates that look for it")


Messages = Annotated[list[ChatMessage], Field(min_length=1)]


class ChatRequest(Generation, Templated):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: int | None = Field(None, ge=1, description="all that there is room for if left out")
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=limits.TOP_LOGPROBS, description="needs logprobs")
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @classmethod
    def refused(cls) -> dict[str, tuple[Any, ...]]:
        return _REFUSED_OF_CHATS


class EmbeddingRequest(Request):
    """POST /v1/embeddings."""

    model: str | None = None
    input: str | list[str] | list[TokenId] | list[list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    user: Any = None

    @classmethod
    def refused(cls) -> dict[str, tuple[Any, ...]]:
        return {"dimensions": ()}


class TokenizeRequest(Templated):
    """POST /tokenize: a text (`content` or `prompt`), or a conversation (`messages`)."""

    model: str | None = None
    content: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special: bool | None = Field(None, description="put the begin token before a text")
    add_special_tokens: bool | None = Field(None, description="the same; true if only `prompt` is given")
    parse_special: bool | None = Field(None, description="special tokens written in the text are special")
    with_pieces: bool | None = Field(None, description="also what each token stands for")
    return_token_strs: bool | None = Field(None, description="also the text of each token")


class DetokenizeRequest(Request):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


class TemplateRequest(Templated):
    """POST /apply-template."""

    messages: Messages
    model: str | None = None


def tools_of(request: Templated) -> list[Any] | None:
    """The functions of a request, as templates take them."""
    return [tool.model_dump(exclude_unset=True) for tool in request.tools or ()] or None
