"""Chat templates that know tools, each of which writes calls in another form, and a tokenizer with marks of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_tokenizers import write_bpe

from utils.data.template import JinjaTemplate
from utils.families.tokenizers import Tokenizer, load_tokenizer

HERMES = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- "You may call these functions:" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n<tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" and message.tool_calls %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
BARE = """{%- for message in messages %}
    {%- if message.role == "assistant" and message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("one call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|im_start|>assistant\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- '}<|im_end|>' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>ipython\\n\\n' + message.content | tojson + '<|im_end|>' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n\\n' }}
        {%- if message.role == "user" and tools and loop.first %}{{- tools | tojson + '\\n\\n' }}{%- endif %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}
"""
LIST = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- if tools and loop.first %}{{- "[AVAILABLE_TOOLS] " + tools | tojson + "[/AVAILABLE_TOOLS]" }}{%- endif %}
        {{- "[INST] " + message.content + "[/INST]" }}
    {%- elif message.tool_calls %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {%- set text = call.function | tojson %}
            {{- text[:-1] }}
            {%- if call.id is not defined or call.id | length != 9 %}
                {{- raise_exception("ids have 9 letters") }}
            {%- endif %}
            {{- ', "id": "' + call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- endif %}
        {%- endfor %}
        {{- "]" + eos_token }}
    {%- elif message.role == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | tojson + '}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- " " + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
NAMED = """{%- if tools %}{{- '<|im_start|>system' + tools | tojson + '<|im_end|>' }}{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {{- '<|im_start|>assistant' + '<calls>' }}
        {%- for call in message.tool_calls %}
            {{- ('' if loop.first else '\\n') + '<call>function<sep>' + call.function.name }}
            {{- '\\n```json\\n' + call.function.arguments + '\\n```</call>' }}
        {%- endfor %}
        {{- '</calls><|im_end|>' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + message.content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}
"""

TEMPLATES = {
    name: JinjaTemplate(text, name)
    for name, text in {"hermes": HERMES, "bare": BARE, "list": LIST, "named": NAMED}.items()
}


def tool(name: str, properties: dict[str, Any] | None = None, required: tuple[str, ...] = ()) -> dict[str, Any]:
    """A function as OpenAI's requests offer it."""
    parameters = {"type": "object", "properties": properties or {}, "required": list(required)}
    function = {"name": name, "description": f"does {name}", "parameters": parameters | {"additionalProperties": False}}
    return {"type": "function", "function": function}


def write_marked(folder: Path, *marks: str, special: bool = True) -> Tokenizer:
    """A byte-level tokenizer that has these marks as tokens."""
    config = write_bpe(folder)
    size = config["vocab_size"]
    added = {str(size + place): {"content": mark, "special": special} for place, mark in enumerate(marks)}
    config = write_bpe(folder, added_tokens_decoder=added)
    return load_tokenizer(folder, {**config, "vocab_size": size + len(marks)})
