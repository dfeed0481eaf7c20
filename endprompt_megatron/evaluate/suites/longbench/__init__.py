"""LongBench v1: 21 tasks in 6 groups, asked and scored as the benchmark's own pred.py and eval.py do it."""

from endprompt_megatron.evaluate.suites.longbench.longbench_prompts import (
    chat_wrapper,
    default_max_length,
)
from endprompt_megatron.evaluate.suites.longbench.longbench_suite import (
    LongBenchSettings,
    check,
    samples,
    score,
    sources,
)
from endprompt_megatron.evaluate.suites.longbench.longbench_summary import summary

__all__ = [
    "LongBenchSettings",
    "chat_wrapper",
    "check",
    "default_max_length",
    "samples",
    "score",
    "sources",
    "summary",
]
