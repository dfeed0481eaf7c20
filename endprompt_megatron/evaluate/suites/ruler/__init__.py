"""RULER: 13 tasks whose inputs grow with the length, as NVIDIA/RULER makes and scores them (commit c3f5e3b).

Given the same tokenizer, seed, words and source files the questions are those of NVIDIA's generators to the letter, and
the scores those of its metrics; benchmarks/ruler_generation.py compares them side by side.
"""

from endprompt_megatron.evaluate.suites.ruler.ruler_scores import score, summary
from endprompt_megatron.evaluate.suites.ruler.ruler_settings import RulerSettings
from endprompt_megatron.evaluate.suites.ruler.ruler_suite import check, samples, sources
from endprompt_megatron.evaluate.suites.ruler.ruler_tasks import TASKS

__all__ = ["TASKS", "RulerSettings", "check", "samples", "score", "sources", "summary"]
