"""LongBench's 21 tasks: group, language, metric, tokens of an answer, size, and a digest of the published prompt.

What the benchmark's `dataset2maxlen`, `dataset2metric` and task table say.  The prompt texts come with the benchmark
(prompts.py); the digests here tell whether they are the published ones.
"""

from dataclasses import dataclass

GROUPS = ("single_doc_qa", "multi_doc_qa", "summarization", "few_shot", "synthetic", "code")


@dataclass(frozen=True)
class Task:
    """One task.  `size` and `size_e` are the published numbers of questions, `size_e` 0 where LongBench-E has none."""

    name: str
    group: str
    language: str  # "en", "zh" or "code"
    metric: str  # a key of metrics.METRICS
    max_new_tokens: int
    size: int
    size_e: int
    prompt_checksum: str  # the first 16 hexadecimal digits of the prompt's SHA-256

    @property
    def first_line_only(self) -> bool:
        """Few-shot answers end with their line: models go on to write further examples."""
        return self.group == "few_shot"

    @property
    def chat(self) -> bool:
        """Whether a chat model is asked in its template; few-shot examples and code are to be continued as they are."""
        return self.group not in ("few_shot", "code")


_ALL = (
    Task("narrativeqa", "single_doc_qa", "en", "f1", 128, 200, 0, "aada7ed24b06abac"),
    Task("qasper", "single_doc_qa", "en", "f1", 128, 200, 224, "0fbdd123fe7f83d6"),
    Task("multifieldqa_en", "single_doc_qa", "en", "f1", 64, 150, 150, "20b4666a2de8a1f7"),
    Task("multifieldqa_zh", "single_doc_qa", "zh", "f1_zh", 64, 200, 0, "344b3a4e557cd547"),
    Task("hotpotqa", "multi_doc_qa", "en", "f1", 32, 200, 300, "9ec4ae308865bd0c"),
    Task("2wikimqa", "multi_doc_qa", "en", "f1", 32, 200, 300, "9ec4ae308865bd0c"),
    Task("musique", "multi_doc_qa", "en", "f1", 32, 200, 0, "9ec4ae308865bd0c"),
    Task("dureader", "multi_doc_qa", "zh", "rouge_l_zh", 128, 200, 0, "ae53329f51b17908"),
    Task("gov_report", "summarization", "en", "rouge_l", 512, 200, 300, "91c25d585b189ced"),
    Task("qmsum", "summarization", "en", "rouge_l", 512, 200, 0, "dca23b678fe0183b"),
    Task("multi_news", "summarization", "en", "rouge_l", 512, 200, 294, "2af3f28c40b902e6"),
    Task("vcsum", "summarization", "zh", "rouge_l_zh", 512, 200, 0, "3e5d8241bc9b512e"),
    Task("trec", "few_shot", "en", "classification", 64, 200, 300, "0eff8bebdba99d91"),
    Task("triviaqa", "few_shot", "en", "f1", 32, 200, 300, "00a802e6377e72fc"),
    Task("samsum", "few_shot", "en", "rouge_l", 128, 200, 300, "a68d884234907eef"),
    Task("lsht", "few_shot", "zh", "classification", 64, 200, 0, "f3edabdf7fae53d6"),
    Task("passage_count", "synthetic", "en", "count", 32, 200, 300, "986550b6c61009c6"),
    Task("passage_retrieval_en", "synthetic", "en", "retrieval", 32, 200, 300, "39b96b7fa52bdd2a"),
    Task("passage_retrieval_zh", "synthetic", "zh", "retrieval_zh", 32, 200, 0, "c1e2346e245eb365"),
    Task("lcc", "code", "code", "code", 64, 500, 300, "6a1f24cf0bb83cd9"),
    Task("repobench-p", "code", "code", "code", 64, 500, 300, "ee9ec182ea5ffeb7"),
)
TASKS = {task.name: task for task in _ALL}
EXTENDED_TASKS = tuple(task.name for task in _ALL if task.size_e)  # LongBench-E
NOT_CHINESE = tuple(task.name for task in _ALL if task.language != "zh")  # the 16 that the paper averages
