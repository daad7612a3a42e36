"""What an evaluation measures: perplexity and accuracy, or BLEU and ROUGE of generated text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_CHINESE = re.compile(r"[\u3400-\u9fff]")
_WORDS = re.compile(r"[\u3400-\u9fff]|\w+")


def likelihood_metrics(loss_sum: float, right: int, targets: int) -> dict[str, float]:
    """loss (nats per target), ppl = exp(loss) and accuracy (share of targets that greedy choice hits)."""
    if not targets:
        return {"loss": math.nan, "ppl": math.nan, "accuracy": math.nan}
    loss = loss_sum / targets
    return {"loss": loss, "ppl": math.exp(min(loss, 700.0)), "accuracy": right / targets}


class _Words:
    """Splits text for ROUGE: words of alphabets, single Chinese characters, lower case."""

    def tokenize(self, text: str) -> list[str]:
        return _WORDS.findall(text.lower())


def text_metrics(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU-4 of the corpus and mean ROUGE-1/2/L F1, all between 0 and 1.

    BLEU is sacrebleu's with its standard tokenizers (Post 2018, arXiv:1804.08771), Chinese by
    characters; ROUGE is rouge_score's (Lin 2004) over words and Chinese characters, not stemmed.

    Raises:
        ValueError: no rows, or as many outputs as references are not given.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    if not outputs or len(outputs) != len(references):
        raise ValueError(f"{len(outputs)} outputs and {len(references)} references")
    chinese = any(_CHINESE.search(reference) for reference in references)
    bleu = BLEU(tokenize="zh" if chinese else "13a").corpus_score(list(outputs), [list(references)])
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(kinds), tokenizer=_Words())
    scores = [scorer.score(r, o) for o, r in zip(outputs, references, strict=True)]
    means = {kind.lower(): sum(score[kind].fmeasure for score in scores) / len(scores) for kind in kinds}
    return {"bleu4": bleu.score / 100.0, **means}
