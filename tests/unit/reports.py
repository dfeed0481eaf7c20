"""Runs and evaluations for the report's tests: real questions and evaluate's own tables, answered by doubles."""

import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import ruler_files
import small

from endprompt_megatron.evaluate.engines.base import Answer
from endprompt_megatron.evaluate.evaluation import evaluate
from endprompt_megatron.evaluate.intervals import comparisons
from endprompt_megatron.evaluate.preparation import Model
from endprompt_megatron.evaluate.registry import SUITES, Settings, Subject
from endprompt_megatron.evaluate.requests import Response
from endprompt_megatron.evaluate.suites import lm_eval, lm_eval_suite

LONGBENCH = Path(__file__).resolve().parent.parent / "longbench"
WINDOW, TARGET = 4096, 32768
LENGTHS = [2048, 6144]
DEPTHS = [0.1, 0.5, 0.9]
SHORT = {"mmlu": (0.58, 1400), "gsm8k": (0.41, 300), "hellaswag": (0.77, 1000)}


class Skilled:
    """A model at the engine protocol that is as good as `skill(tokens)`, 0..1, says; the same inputs, the same luck."""

    def __init__(self, path, tokenizer, skill, seed=0):
        self.path, self.tokenizer, self.skill, self.seed = path, tokenizer, skill, seed
        self.references = {}  # of prompts, by their last tokens and length

    def _luck(self, *what):
        return np.random.default_rng([self.seed, *(int(each) for each in what)])

    def token_losses(self, tokens, position_ids=None, *, last=None):
        reach = tokens.shape[1] if position_ids is None else int(position_ids.max()) + 1
        rng = np.random.default_rng(int(tokens[0, -1]) + tokens.shape[1])
        losses = rng.gamma(2.0, 1.4, (tokens.shape[0], tokens.shape[1] - 1)) + 6 * (1 - self.skill(reach))
        losses *= 1.0 + 0.5 / np.sqrt(1 + np.arange(losses.shape[1]))
        correct = rng.random(losses.shape) < 0.7 * self.skill(reach)
        rows = slice(None) if last is None else slice(-last, None)
        return losses[:, rows].astype(np.float32), correct[:, rows]

    def generate(self, prompt_ids, max_new_tokens, ended=None):
        references = self.references.get(key_of(prompt_ids), ["nothing"])
        right = self._luck(len(prompt_ids), sum(prompt_ids)).random() < self.skill(len(prompt_ids))
        return self.tokenizer.encode(" ".join(references) if right else "I do not know")[: max(max_new_tokens, 64)]

    def answer(self, prompt_ids, expected, max_new_tokens):
        right = self._luck(len(prompt_ids), sum(prompt_ids)).random() < self.skill(len(prompt_ids))
        spread = np.full(len(expected), -0.05 if right else -6.0, np.float32)
        return Answer(expected if right else [], spread, np.full(len(expected), 0 if right else 9))

    def describe(self):
        return {"engine": "double", "path": str(self.path), "window": WINDOW, "dtype": "float32"}


def key_of(prompt_ids):
    return len(prompt_ids), tuple(prompt_ids[-400:])


def before(tokens):
    """Good up to its window, lost past it."""
    return 0.85 if tokens <= WINDOW else 0.02


def after(tokens):
    """A little worse than before at every length, and never lost."""
    return 0.9 - 0.08 * math.log2(max(tokens, 512) / 512)


def worse(tokens):
    return after(tokens) - 0.25


def sources(directory: Path) -> Path:
    """Files for RULER and a held-out text, and two tiny models with the tokenizer that belongs to them."""
    ruler_files.write_all(directory / "ruler")
    size = json.loads((directory / "ruler/tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    for name, seed in (("Tiny-Llama-base", 0), ("hf", 1)):
        model = small.small_llama(
            directory / name,
            seed=seed,
            tokenizer=False,
            vocab_size=len(size) + 64,
            max_position_embeddings=WINDOW if seed == 0 else TARGET,
        )
        for file in (directory / "ruler/tokenizer").iterdir():
            shutil.copy(file, model / file.name)
    (directory / "book.txt").write_text(small.text(40_000, seed=9))
    return directory


def evaluated(
    made: Path, out: Path, skill=after, suites=("perplexity", "needle", "virtual", "ruler", "longbench"), **more
):
    """results.json in `out` of a model as good as `skill` and its baseline; short text besides, where asked for."""
    native = [suite for suite in suites if suite != "short"]
    files = {key: str(made / "ruler" / name) for key, name in (("squad", "squad.json"), ("hotpotqa", "hotpotqa.json"))}
    settings = Settings(
        **{
            "suites": native,
            "lengths": LENGTHS,
            "text": str(made / "book.txt"),
            "scored": 256,
            "windows": 3,
            "depths": DEPTHS,
            "samples": 4,
            "physical": 256,
            "ruler_samples": 4,
            "ruler_tasks": ["niah_single_1", "niah_single_2", "vt", "qa_1"],
            "haystack": str(made / "ruler/essays.json"),
            "punkt": str(made / "ruler/punkt"),
            "longbench_data": str(LONGBENCH),
            "beyond_window": True,
            **files,
            **more,
        }
    )
    places = {"baseline": made / "Tiny-Llama-base", "extended": made / "hf"}
    models = {label: Model(place, place) for label, place in places.items()}
    results = evaluate(settings, models, out, lambda model: _told(settings, model, models, skill))
    if "short" in suites:
        _add_short(results, settings)
        (out / "results.json").write_text(json.dumps(results))
    return results


def _told(settings, model, models, skill):
    """The double of a model, which knows the references of every question."""
    from endprompt_megatron.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model.config)
    double = Skilled(model.weights, tokenizer, before if model is models["baseline"] else skill)
    for label, asked in models.items():
        if asked is model:
            for name in {"ruler", "longbench"} & set(settings.suites):
                prepared = SUITES[name].prepare(Subject(settings, models, label, tokenizer, None, model.window))
                for request in prepared.requests():
                    double.references[key_of(request.prompt.ids)] = request.notes["references"]
    return double


def _add_short(results, settings):
    """Short text as lm-eval's worker gives it, put together by the suite itself."""
    series = {}
    for label, shift in (("baseline", 0.0), ("extended", -0.03)):
        responses = []
        for task, (share, count) in SHORT.items():
            row = {
                "score": 100 * round((share + shift) * count) / count,
                "stderr": 1.0,
                "metric": "acc,none",
                "shots": lm_eval.TASKS[task].shots,
                "questions": count,
                "all": {},
            }
            responses.append(Response("short", task, 0, 0, {}, {"tasks": {task: row}, "lm_eval": "0.4.9"}))
        results["measurements"][label]["short"] = lm_eval_suite.result(responses, settings.limit)
        series[label] = lm_eval_suite.series(responses)
        results["scores"][label] += [each.score() for each in series[label]]
    results["comparisons"] += comparisons(series["baseline"], series["extended"])


RECIPE = """\
model: {hf: HF, init_from: HF}
context: {method: METHOD, original: 4096, target: 32768, physical: 4096, prompts: [EP_1], chunks: 2,
  rope: {type: ROPE, factor: 8.0}}
data: {train: data/train}
train: {global_batch_size: 4, micro_batch_size: 1, seed: 1, steps: 60}
optim: {lr: 2.0e-4}
precision: {dtype: bfloat16}
checkpoint: {dir: run}
"""


def trained(run: Path, made: Path, method="end_prompt", rope="linear", level=3.2, steps=60) -> Path:
    """recipe.yaml, metrics.jsonl and data_seen.json of a run of 2 processes."""
    run.mkdir(parents=True, exist_ok=True)
    text = RECIPE.replace("HF", str(made / "Tiny-Llama-base")).replace("METHOD", method).replace("ROPE", rope)
    (run / "recipe.yaml").write_text(text)
    rng, lines = np.random.default_rng(len(method)), []
    for step in range(1, steps + 1):
        loss = level + 1.5 * math.exp(-step / 15) + float(rng.normal(0, 0.06))
        prompt = 5 * math.exp(-step / 6) + 0.02 if method.startswith("end_prompt") else None
        lines.append(
            {
                "step": step,
                "consumed_samples": 4 * step,
                "consumed_tokens": 16384 * step,
                "loss": loss if prompt is None else 0.99 * loss + 0.01 * prompt,
                "loss_context": loss,
                "loss_prompt": prompt,
                "grad_norm": None if step == 3 else 1.0 + 4 / step,
                "lr": 2e-4 * min(1, step / 10),
                "step_time_s": 16384 / 3900.0,
                "tokens_per_s": 3900.0,
                "tflops_per_gpu": 0.021,
                "mfu": None,
                "memory_gib": 1.5,
                "processes": 2,
                "skipped_steps": 1 if step >= 3 else 0,
            }
        )
        if step % 20 == 0:
            probe = {
                str(d): {"loss": 1.0 + 5 * math.exp(-step / 30) * math.log2(d / 256 + 1) / 4, "accuracy": 0.5}
                for d in (256, 4096, 32768)
            }
            valid = {"step": step, "valid_loss": loss + 0.1, "valid_loss_context": loss + 0.12, "virtual": probe}
            lines.append(valid)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"prefix": "data/train", "samples": 240, "share": 1.0, "context_tokens": 980_000, "prompt_tokens": 3_000}
    (run / "data_seen.json").write_text(
        json.dumps({"consumed_samples": 240, "sources": [copy.deepcopy(source) | {"epochs": 0.31}]})
    )
    return run
