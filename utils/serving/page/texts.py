"""What the page says, in English and Chinese."""

from __future__ import annotations

from collections.abc import Mapping

LANGUAGES = ("en", "zh-CN")  # as Gradio calls those of its own texts
COOKIE = "page_language"  # the language that the user has chosen

TEXTS = {
    # key: (English, Chinese)
    "new_chat": ("New chat", "新对话"),
    "language": ("中文", "English"),
    "theme": ("Light / dark", "浅色 / 深色"),
    "settings": ("Settings", "设置"),
    "model": ("Model", "模型"),
    "system": ("System prompt", "系统提示词"),
    "system_hint": ("How the model is to behave", "模型应如何回答"),
    "temperature": ("Temperature", "温度"),
    "temperature_help": ("0 always takes the likeliest token", "0 表示总是选择概率最高的词元"),
    "top_p": ("Top-p", "Top-p"),
    "top_p_help": ("Likeliest tokens that have this share together", "概率之和达到此值的最可能词元"),
    "top_k": ("Top-k", "Top-k"),
    "top_k_help": ("So many of the likeliest tokens; 0: all", "只考虑最可能的若干词元；0 为全部"),
    "max_tokens": ("Length of an answer", "回答长度"),
    "max_tokens_help": ("At most so many tokens", "词元数上限"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "repetition_penalty_help": ("1: none", "1 表示不惩罚"),
    "seed": ("Seed", "随机种子"),
    "seed_help": (
        "The same seed gives the same answer; -1: a new one each time",
        "相同种子得到相同回答；-1 表示每次随机",
    ),
    "send": ("Send", "发送"),
    "stop": ("Stop", "停止"),
    "message": ("Write a message …", "输入消息…"),
    "start": ("What would you like to know?", "想聊点什么？"),
    "conversation": ("Conversation", "对话"),
    # what an answer is doing; {} is filled in
    "waiting": ("waiting · {seconds:.0f} s", "等待中 · {seconds:.0f} 秒"),
    "writing": ("writing · {seconds:.1f} s", "生成中 · {seconds:.1f} 秒"),
    "loading": (
        "The server is not ready yet, your message waits for it · {seconds:.0f} s · {message}",
        "服务器尚未就绪，消息将在就绪后发送 · {seconds:.0f} 秒 · {message}",
    ),
    "speed": ("{completion} tokens · {rate:.1f} tokens/s", "{completion} 个词元 · {rate:.1f} 词元/秒"),
    "done": ("first after {first:.2f} s · prompt {prompt} tokens", "首个用时 {first:.2f} 秒 · 提示 {prompt} 个词元"),
    "done_uncounted": ("done · {seconds:.1f} s", "完成 · {seconds:.1f} 秒"),
    "cut": ("the answer has reached its longest length", "回答已达到长度上限"),
    "stopped": ("stopped", "已停止"),
    "unreachable": (
        "The server does not answer; try again when it runs.",
        "服务器没有响应，请在其运行后重试。",
    ),
    "ended_early": ("The server has ended the answer early; try again.", "服务器提前中断了回答，请重试。"),
    "refused": ("{message}", "{message}"),
    # the question for the key
    "key": ("API key", "API 密钥"),
    "key_wrong": ("That is not the key of this server.", "密钥不正确。"),
    "enter": ("Open", "进入"),
}


def translations(language: str) -> dict[str, str]:
    """All texts in one language."""
    column = LANGUAGES.index(language)
    return {key: texts[column] for key, texts in TEXTS.items()}


def say(language: str, key: str, **values: object) -> str:
    """One text with its values."""
    return TEXTS[key][LANGUAGES.index(language)].format(**values)


def language_of(headers: Mapping[str, str], cookies: Mapping[str, str]) -> str:
    """The language that the user has chosen, or else the first of the browser's that the page knows."""
    if cookies.get(COOKIE) in LANGUAGES:
        return cookies[COOKIE]
    for accepted in headers.get("accept-language", "").lower().split(","):
        for language in LANGUAGES:
            if accepted.strip()[:2] == language[:2]:
                return language
    return LANGUAGES[0]
