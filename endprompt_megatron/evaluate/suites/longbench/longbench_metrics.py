"""LongBench's metrics: one prediction against one reference, 0..1, equal to the benchmark's own to the last bit.

Where the benchmark does something odd (removing from a list that it walks over, ROUGE's recursion, a list of Chinese
punctuation with holes), published scores contain it, and so does this.
"""

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from endprompt_megatron.evaluate.suites.longbench.rouge import rouge_l

Metric = Callable[[str, str, Sequence[str]], float]  # prediction, reference, the classes (empty where there are none)

# How deep Python (its limit is 1000) lets `rouge` recurse below the benchmark's eval.py: counted with it.
_DEEPEST, _DEEPEST_ZH = 990, 989
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# Full-width forms without the full stop, brackets of the CJK block without three that the benchmark leaves out, dashes,
# quotation marks and dots.
_CHINESE_RANGES = (
    ("\uff01", "\uff0d"),
    ("\uff0f", "\uff0f"),
    ("\uff1a", "\uff20"),
    ("\uff3b", "\uff40"),
    ("\uff5b", "\uff64"),
    ("\u3001", "\u3003"),
    ("\u300b", "\u3011"),
    ("\u3014", "\u301f"),
    ("\u3030", "\u3030"),
    ("\u303e", "\u303f"),
    ("\u2013", "\u2014"),
    ("\u2018", "\u2019"),
    ("\u201b", "\u201f"),
    ("\u2026", "\u2027"),
    ("\ufe4f", "\ufe4f"),
)
_CHINESE_PUNCTUATION = "".join(chr(c) for first, last in _CHINESE_RANGES for c in range(ord(first), ord(last) + 1))
_NO_PUNCTUATION_ZH = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)


def f1(prediction: str, reference: str, _classes: Sequence[str] = ()) -> float:
    """F1 over words, without case, punctuation and articles."""
    return _overlap(_english(prediction), _english(reference))


def f1_zh(prediction: str, reference: str, _classes: Sequence[str] = ()) -> float:
    """F1 over the words that jieba finds, without case and punctuation."""
    return _overlap(_chinese(prediction), _chinese(reference))


def rouge_l_en(prediction: str, reference: str, _classes: Sequence[str] = ()) -> float:
    """ROUGE-L over words with blanks between them."""
    return rouge_l(prediction, reference, _DEEPEST)


def rouge_l_zh(prediction: str, reference: str, _classes: Sequence[str] = ()) -> float:
    """ROUGE-L over the words that jieba finds."""
    return rouge_l(" ".join(_jieba().cut(prediction)), " ".join(_jieba().cut(reference)), _DEEPEST_ZH)


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that the prediction names, if the right one is among them.

    A class that is part of the right one's name does not count, except right behind another such class: the
    benchmark removes from the list that it walks over, and skips the next.
    """
    named = [name for name in classes if name in prediction]
    place = 0
    while place < len(named):
        if named[place] in reference and named[place] != reference:
            named.remove(named[place])
        place += 1
    return 1.0 / len(named) if reference in named else 0.0


def count(prediction: str, reference: str, _classes: Sequence[str] = ()) -> float:
    """The share of the right one among the numbers in the prediction."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def paragraph(reference: str, chinese: bool) -> str | None:
    """The number in "Paragraph 3" or "段落3", None if the reference names none."""
    found = re.search(r"段落(\d+)" if chinese else r"Paragraph (\d+)", reference)
    return found and found.group(1)


def retrieval(prediction: str, reference: str, _classes: Sequence[str] = ()) -> float:
    """`count` of the paragraph's number."""
    return count(prediction, paragraph(reference, chinese=False))


def retrieval_zh(prediction: str, reference: str, _classes: Sequence[str] = ()) -> float:
    """`count` of the paragraph's number, in Chinese."""
    return count(prediction, paragraph(reference, chinese=True))


def code(prediction: str, reference: str, _classes: Sequence[str] = ()) -> float:
    """Similarity of the first line that is no comment and no fence, in steps of 0.01.

    As fuzzywuzzy computes it by difflib.  With python-Levenshtein beside it, or by rapidfuzz, other numbers come out.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


METRICS: dict[str, Metric] = {
    "f1": f1,
    "f1_zh": f1_zh,
    "rouge_l": rouge_l_en,
    "rouge_l_zh": rouge_l_zh,
    "classification": classification,
    "count": count,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "code": code,
}


def _overlap(predicted: list[str], expected: list[str]) -> float:
    """F1 of two bags of words."""
    same = sum((Counter(predicted) & Counter(expected)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(predicted), same / len(expected)
    return 2 * precision * recall / (precision + recall)


def _english(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _chinese(text: str) -> list[str]:
    bare = ("".join(word.lower().translate(_NO_PUNCTUATION_ZH).split()) for word in _jieba().cut(text))
    return [word for word in bare if word]


@functools.cache
def _jieba():
    """jieba, quiet; its dictionary takes about a second to load, once."""
    import logging

    import jieba

    jieba.setLogLevel(logging.WARNING)
    return jieba
