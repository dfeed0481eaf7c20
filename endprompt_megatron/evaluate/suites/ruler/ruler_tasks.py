"""The 13 tasks: what each asks, in which words, with how many new tokens, and how its answers are matched.

The wording is NVIDIA/RULER's (Apache-2.0): another wording would be another benchmark.
"""

from dataclasses import dataclass, field

ALL, PART = "all", "part"  # how references count: the mean of hits, or the best one


@dataclass(frozen=True)
class Task:
    """One task.  `arguments` are those of its generator, the module that `kind` names in suite.py."""

    kind: str
    new_tokens: int
    question: str
    answer_prefix: str
    match: str = ALL
    arguments: dict = field(default_factory=dict)


def _needles(haystack: str, key: str = "words", value: str = "numbers", **numbers: int) -> Task:
    return Task(
        kind="niah",
        new_tokens=128,
        question=(
            "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will "
            "quiz you about the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} "
            "for {query} mentioned in the provided text?"
        ),
        answer_prefix=" The special magic {type_needle_v} for {query} mentioned in the provided text are",
        arguments={"haystack": haystack, "key": key, "value": value, **numbers},
    )


def _documents(dataset: str) -> Task:
    only = "Only give me the answer and do not output any other words."
    return Task(
        kind="qa",
        new_tokens=32,
        question=(
            f"Answer the question based on the given documents. {only}\n\nThe following are given documents.\n\n"
            f"{{context}}\n\nAnswer the question based on the given documents. {only}\n\nQuestion: {{query}}"
        ),
        answer_prefix=" Answer:",
        match=PART,
        arguments={"dataset": dataset},
    )


TASKS = {
    "niah_single_1": _needles("noise"),
    "niah_single_2": _needles("essay"),
    "niah_single_3": _needles("essay", value="uuids"),
    "niah_multikey_1": _needles("essay", keys=4),
    "niah_multikey_2": _needles("needle"),
    "niah_multikey_3": _needles("needle", key="uuids", value="uuids"),
    "niah_multivalue": _needles("essay", values=4),
    "niah_multiquery": _needles("essay", keys=4, queries=4),
    "vt": Task(
        kind="vt",
        new_tokens=30,
        question=(
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
            "Question: Find all variables that are assigned the value {query} in the text above."
        ),
        answer_prefix=(
            " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are "
            "assigned the value {query}, they are: "
        ),
    ),
    "cwe": Task(
        kind="cwe",
        new_tokens=120,
        question=(
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            "that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
        ),
        answer_prefix=" Answer: The top 10 words that appear most often in the list are:",
    ),
    "fwe": Task(
        kind="fwe",
        new_tokens=50,
        question=(
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text?"
        ),
        answer_prefix=" Answer: According to the coded text above, the three most frequently appeared words are:",
    ),
    "qa_1": _documents("squad"),
    "qa_2": _documents("hotpotqa"),
}
ESSAY_TASKS = tuple(name for name, task in TASKS.items() if task.arguments.get("haystack") == "essay")
