"""What of HTML a message may contain: what Markdown becomes, and nothing that somebody has written as HTML.

Gradio cleans the HTML of messages, but lets styles, forms, and even orders to go to another page pass. It also offers
to show tags as text, named by regular expressions, before that. The one here names every tag but those that Gradio's
own Markdown makes, attribute for attribute.
"""

from __future__ import annotations

_NAMES = (
    "p|br|hr|h[1-6]|strong|em|del|sub|sup|ul|ol|li|blockquote|table|thead|tbody|tr|th|td|a|img|input"
    "|pre|code|span|div|button|svg|path"
)
_VALUES = (  # attributes that may have any value; addresses are checked by Gradio and by the content security policy
    "href|target|rel|title|src|alt|align|start|type|checked|disabled|xmlns|xmlns:xlink|version|width|height|viewBox"
    "|aria-hidden|aria-label|color|fill|stroke|stroke-width|d"
)
_CLASSES = r"code_wrap|copy_code_button|copy-text|check|mermaid|latex-block|language-[\w+#.-]*|token(?: [a-z-]+)*"
_MADE_BY_MARKDOWN = rf"""/?(?:{_NAMES})(?:\s+(?:(?:{_VALUES})="[^"]*"|class="(?:{_CLASSES})"))*\s*/?>"""

SHOWN_AS_TEXT = [rf"(?!{_MADE_BY_MARKDOWN})[a-z!?/][^>]*"]  # for `gr.Chatbot(allow_tags=...)`
