"""Calls of functions: how a model's chat template writes them, answers that must call, answers read for calls.

form = form_of(template, tokenizer)                    None: the template writes no calls, or none that are understood
grammar = form.grammar(tools, name, parallel=False)    of an answer that must call one of the functions, or this one
content, calls = read_answer(form, tools, text)        a whole answer
reader = CallReader(form, tools)                       the same piece by piece, as `Said`: reader.push(text, last=False)
marks = Visible(form, tokenizer, stop, end_ids)        an answer's text with the special tokens that calls have:
                                                       marks.push(tokens, last=False); needed if form.special
"""

from utils.serving.tools.calls import CallReader, Said, read_answer
from utils.serving.tools.form import CallForm, arguments_schema, form_of
from utils.serving.tools.visible import Visible

__all__ = ["CallForm", "CallReader", "Said", "Visible", "arguments_schema", "form_of", "read_answer"]
