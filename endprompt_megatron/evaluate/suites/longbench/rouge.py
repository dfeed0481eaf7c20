"""ROUGE-L as LongBench has it: the summary level of the `rouge` package (1.0.1), its quirks included.

Sentences end at full stops; words are counted once; a word of the reference counts if it stands in the longest
common subsequence of any pair of sentences.  Of several longest subsequences the one matters that the package
finds when it walks back through its table.  It walks by recursion: where that is deeper than Python allows, the
original scores 0, and so does this.
"""

_SMALL = 1e-8  # the package's guard against a division by zero, which keeps a perfect score just below 1


def rouge_l(prediction: str, reference: str, deepest: int) -> float:
    """F-measure of two texts, 0 for an empty one.  `deepest`: steps that the original's recursion can take."""
    predicted, expected = _sentences(prediction), _sentences(reference)
    if not predicted or not expected:
        return 0.0
    common: set[str] = set()
    for sentence in expected:
        for candidate in predicted:
            found = _common_words(sentence, candidate, deepest)
            if found is None:
                return 0.0
            common |= found
    recall = len(common) / len(set().union(*expected))
    precision = len(common) / len(set().union(*predicted))
    return 2.0 * ((precision * recall) / (precision + recall + _SMALL))


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence.  A blank between two full stops is a sentence of one empty word, as in the package."""
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _common_words(x: list[str], y: list[str], deepest: int) -> set[str] | None:
    """Words of a longest common subsequence, None if the way back through the table takes more than `deepest` steps."""
    rows = [[0] * (len(y) + 1)]
    for word in x:
        above, row = rows[-1], [0]
        for j, other in enumerate(y):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        rows.append(row)
    i, j, steps, words = len(x), len(y), 0, set()
    while i and j:
        steps += 1
        if x[i - 1] == y[j - 1]:
            words.add(x[i - 1])
            i, j = i - 1, j - 1
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return None if steps > deepest else words
