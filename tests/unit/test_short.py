"""Short text through lm-eval: what is refused in one line, and the real lm-eval on a task of our own."""

import importlib.util
import json
import sys

import pytest
from small import small_llama, text

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.suites import lm_eval

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {data}, test: {data}}}}}
training_split: train
fewshot_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}} Answer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
fewshot_config: {{sampler: first_n}}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
GROUP = """
group: pair
task: [own, again]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
QUESTIONS = [
    {"question": text(4, seed), "choices": [text(2, 100 + seed), text(3, 200 + seed)], "label": seed % 2}
    for seed in range(24)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A directory with the lm-eval tasks `own`, `again`, both as the group `pair`, and `lost`, which has no data."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    directory = tmp_path / "tasks"
    directory.mkdir()
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, file in (("own", data), ("again", data), ("lost", tmp_path / "nowhere.jsonl")):
        (directory / f"{name}.yaml").write_text(TASK.format(name=name, data=file))
    (directory / "pair.yaml").write_text(GROUP)
    return directory


def refused(*args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        lm_eval.run(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_lm_eval_that_is_not_installed_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # Python's own way to say that there is none
    assert refused(model, ["hellaswag"]) == ("short text: needs lm-eval, which is not installed; `pip install lm-eval`")


@needs_lm_eval
def test_an_lm_eval_backend_that_is_not_installed_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "needs vllm, which is not installed" in refused(model, ["hellaswag"], backend="vllm")


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        ({"tasks": []}, "tasks none; name each once, such as mmlu,gsm8k,hellaswag,humaneval"),
        ({"tasks": ["mmlu", "mmlu"]}, "tasks mmlu,mmlu; name each once"),
        ({"limit": 0}, "0 questions a task"),
        ({"shots": {"arc": 5}}, "5 examples for arc"),
        ({"shots": {"mmlu": -1}}, "-1 examples for mmlu"),
        ({"backend": "sglang"}, "there is no backend 'sglang'; use one of hf, vllm"),
    ],
)
def test_lm_eval_arguments_that_cannot_be_used_are_refused(arguments, needle, model):
    assert needle in refused(model, **arguments)


@needs_lm_eval
def test_humaneval_runs_model_code_only_if_that_is_allowed(model, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    assert "set HF_ALLOW_CODE_EVAL=1 to allow it, or leave the task out" in refused(model, ["humaneval"])


@needs_lm_eval
def test_lm_eval_tasks_that_cannot_be_asked_are_known_before_a_model_is_loaded(tasks, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    reasons = lm_eval.left_out(["own", "lost", "humaneval"], include=tasks)
    assert list(reasons) == ["humaneval", "lost"]
    assert "set HF_ALLOW_CODE_EVAL=1" in reasons["humaneval"]
    assert "its data is not in the caches and cannot be reached" in reasons["lost"]
    with pytest.raises(InputError, match="has no task 'own_too'"):
        lm_eval.left_out(["own_too"], include=tasks)


@needs_lm_eval
def test_a_directory_without_a_model_is_refused_before_lm_eval_starts(tmp_path):
    assert str(tmp_path) in refused(tmp_path, ["mmlu"])


@needs_lm_eval
@pytest.mark.parametrize("task", ["hellaswag", "lost"])
def test_lm_eval_data_out_of_reach_is_named(task, model, tasks):
    message = refused(model, [task], include=tasks)
    assert message.startswith(f"short text: {task}: its data is not in the caches and cannot be reached (")
    assert message.endswith("copy its HF_HOME")


@needs_lm_eval
def test_an_unknown_lm_eval_task_is_named(model, tasks):
    assert "has no task 'own_too'" in refused(model, ["own_too"], include=tasks)


@needs_lm_eval
@pytest.mark.parametrize(("shots", "limit"), [(0, None), (2, 10)])
def test_lm_eval_scores_as_transformers_likelihoods_do(shots, limit, model, tasks):
    found = lm_eval.run(model, ["own"], limit, shots={"own": shots}, dtype="float32", include=tasks)
    right = likelier(model, shots)[:limit]
    row = found["tasks"]["own"]
    assert row["score"] == pytest.approx(100 * sum(right) / len(right))
    assert (row["metric"], row["shots"], row["questions"]) == ("acc,none", shots, len(right))
    assert row["stderr"] >= 0
    assert 0 < sum(right) < len(right)
    assert found["mean"] == {"score": None, "complete": False, "missing": list(lm_eval.TASKS)}
    assert found["limit"] == limit


@needs_lm_eval
def test_a_group_of_lm_eval_tasks_is_one_row(model, tasks):
    row = lm_eval.run(model, ["pair"], 5, dtype="float32", include=tasks)["tasks"]["pair"]
    assert row["score"] == pytest.approx(100 * sum(likelier(model, 0)[:5]) / 5)
    assert (row["metric"], row["shots"], row["questions"]) == ("acc,none", 0, 10)


def likelier(model, shots: int) -> list[bool]:
    """Whether the right choice has the higher likelihood, for each question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ask = "Question: {question} Answer:".format
    right = []
    for question in QUESTIONS:
        # lm-eval leaves the question itself out of its examples.
        examples = [other for other in QUESTIONS if other != question][:shots]
        before = "".join(f"{ask(**other)} {other['choices'][other['label']]}\n\n" for other in examples)
        context, sums = tokenizer(before + ask(**question)).input_ids, []
        for choice in question["choices"]:
            ids = torch.tensor([context + tokenizer(" " + choice).input_ids])
            with torch.inference_mode():
                logprobs = network(ids, attention_mask=torch.ones_like(ids)).logits.log_softmax(-1)
            of_choice = range(len(context), ids.shape[1])
            sums.append(sum(float(logprobs[0, place - 1, ids[0, place]]) for place in of_choice))
        right.append(sums.index(max(sums)) == question["label"])
    return right
