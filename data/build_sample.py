"""Builds the sample datasets of this folder from the raw files of their sources.

    python data/build_sample.py ASSETS

ASSETS holds wordnet_definitions.jsonl, chatterbot_english.jsonl, chatterbot_chinese.jsonl,
django_en_zh.jsonl, songci_zh.jsonl and tang_couplets_zh.jsonl, JSON Lines with "src" and "tgt".
Written are train.json and dev.json here (English) and in zh/ (Chinese). Rows are chosen and, in the
Chinese part, given a line of instruction; which row goes where depends on its text alone, so that two
runs write the same bytes. NOTICE names the sources and their licences.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

Pair = tuple[str, str]

HERE = Path(__file__).resolve().parent
# WordNet is a record of the language with all that is said in it; a first example needs none of this.
UNFIT = re.compile(
    r"slur|offensive|disparag|derogat|obscen|vulgar|sex|genital|penis|vagina|testicle|breast|nude|naked|"
    r"prostitut|whore|rape|incest|pornog|erotic|copulat|intercourse|feces|excrement|urin|anus|anal\b|"
    r"kill|murder|suicid|tortur|slave|nazi|hitler|terror|genocid|assassin|shot dead|execution|corpse|"
    r"negro|nigg|race\b|racial|ethnic|tribe|savage|jew|muslim|islam|christ|god\b|religio|cocaine|heroin|"
    r"marijuana|narcotic|drunk|idiot|moron|imbecil|retard|cripple|stupid|homosexual|lesbian|gay\b|"
    r"gonorrh|syphil|venereal",
    re.IGNORECASE,
)
DEFINE = re.compile(r'^Define the (noun|verb|adj|adv) "([a-z][a-z \-]{3,})"\.$')
ENTRIES = {"noun": (1290, 140), "adj": (300, 33), "verb": (220, 24), "adv": (160, 18)}  # train, dev
TRIVIA = re.compile(r"^(What|Which|Who|When|Where|How many|In|On|The)\b.{14,}\?$")
PERSONAL = re.compile(r"\byou|\byour|\bI\b|\bI'm\b|robot|crash|buried|illegal|dies\b|Alicia S|Muhammed|Justin R")
MISSPELT = ("Antartica", "kilobyte", "Larry", "Barbara")
TRIVIA_DEV = 18
# The rest of the Chinese small talk was translated by machine, and badly.
CHINESE_TALK = (
    "什么是H2O",
    "什么是机器人",
    "什么是绿色和平组织",
    "什么是爱",
    "什么是钱",
    "什么是ai",
    "谁发明了电灯泡",
    "谁发明了蒸汽机",
    "谁是美国第37届总统?",
)


def order(pair: Pair) -> str:
    """A fixed shuffle: the hash of the row."""
    return hashlib.sha256("\0".join(pair).encode()).hexdigest()


def read(file: Path) -> list[Pair]:
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [(row["src"].strip(), row["tgt"].strip()) for row in rows]


def choose(pairs: Iterable[Pair], fits: Callable[[str, str], object]) -> list[Pair]:
    """The rows that fit, each question and each answer once, in the fixed shuffle."""
    chosen: list[Pair] = []
    sources, targets = set[str](), set[str]()
    for source, target in sorted(set(pairs), key=order):
        key = target.lower()
        if source not in sources and key not in targets and fits(source, target):
            chosen.append((source, target))
            sources.add(source)
            targets.add(key)
    return chosen


def definitions(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """WordNet entries by part of speech: words with one entry, and definitions of one plain clause."""
    entries = Counter(source.split('"')[1] for source, _ in pairs)

    def fits(source: str, target: str) -> bool:
        found = DEFINE.match(source)
        return (
            found is not None
            and entries[found[2]] == 1  # of words with several senses, any one answer looks arbitrary
            and len(found[2]) >= 5
            and 20 <= len(target) <= 80
            and len(target.split()) >= 4
            and re.fullmatch(r"[A-Za-z ,'\-]+", target) is not None
            and not UNFIT.search(source + " " + target)
        )

    chosen = choose(pairs, fits)
    return {kind: [pair for pair in chosen if f"the {kind} " in pair[0]] for kind in ENTRIES}


def trivia(pairs: list[Pair]) -> list[Pair]:
    """Questions of general knowledge with short answers."""

    def fits(source: str, target: str) -> bool:
        return (
            TRIVIA.match(source) is not None
            and 2 <= len(target) <= 60
            and not PERSONAL.search(source + " " + target)
            and not UNFIT.search(source + " " + target)
            and target not in MISSPELT
        )

    return choose(pairs, fits)


def english(assets: Path) -> tuple[list[Pair], list[Pair]]:
    train: list[Pair] = []
    dev: list[Pair] = []
    found = definitions(read(assets / "wordnet_definitions.jsonl"))
    for kind, (for_train, for_dev) in ENTRIES.items():
        if len(found[kind]) < for_train + for_dev:
            raise SystemExit(f"only {len(found[kind])} entries fit for {kind}, {for_train + for_dev} are needed")
        dev += found[kind][:for_dev]
        train += found[kind][for_dev : for_dev + for_train]
    questions = trivia(read(assets / "chatterbot_english.jsonl"))
    return train + questions[TRIVIA_DEV:], dev + questions[:TRIVIA_DEV]


def chinese(assets: Path) -> tuple[list[Pair], list[Pair]]:
    couplets = choose(
        read(assets / "tang_couplets_zh.jsonl"),
        lambda source, target: len(source) == len(target) and (source + target).isalpha(),
    )
    interface = choose(
        read(assets / "django_en_zh.jsonl"),
        lambda source, target: 3 <= len(source) <= 80 and not re.search(r"[%<{\n]", source + target),
    )
    poems = choose(read(assets / "songci_zh.jsonl"), lambda source, target: 20 <= len(target) <= 80)
    talk = choose(read(assets / "chatterbot_chinese.jsonl"), lambda source, _: source in CHINESE_TALK)
    parts: list[tuple[list[Pair], int, int]] = [
        ([(f"请对出下一句：{source}", target) for source, target in couplets], 600, 60),
        ([(f"请翻译成中文：{source}", target) for source, target in interface], 300, 30),
        (poems, 400, 40),
        (talk, len(talk), 0),
    ]
    train = [pair for pairs, for_train, for_dev in parts for pair in pairs[for_dev : for_dev + for_train]]
    dev = [pair for pairs, _, for_dev in parts for pair in pairs[:for_dev]]
    return train, dev


def write(folder: Path, train: list[Pair], dev: list[Pair]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in (("train", train), ("dev", dev)):
        rows = [{"src": source, "tgt": target} for source, target in sorted(pairs, key=order)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
        print(f"{folder / name}.json: {len(rows):,} rows, {len(text.encode()):,} bytes")


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit(f"usage: python {sys.argv[0]} ASSETS (see the top of this file)")
    assets = Path(sys.argv[1])
    write(HERE, *english(assets))
    write(HERE / "zh", *chinese(assets))


if __name__ == "__main__":
    main()
