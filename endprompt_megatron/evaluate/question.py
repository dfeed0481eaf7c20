"""A question: what every suite asks, every engine answers and every store keeps."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Question:
    """One prompt that a model answers.  (suite, task, length, number) names it;
    `length` is 0 where a suite has none.
    """

    suite: str
    task: str
    length: int  # tokens that the input was made for, 0 if none
    number: int
    prompt: list[int]  # token ids, complete: template, answer prefix, BOS if there is to be one
    max_new_tokens: int
    references: list[str]
    stop: tuple[str, ...] = ()  # texts at which an answer ends
    extra: dict = field(default_factory=dict)  # what scoring needs beside the references, JSON
