"""LongBench: records, prompts cut in the middle, questions, scores and tables, on the records of tests/longbench."""

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from small import small_tokenizer

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.suites.longbench import (
    LongBenchSettings,
    chat_wrapper,
    check,
    default_max_length,
    samples,
    score,
    sources,
    summary,
)
from endprompt_megatron.evaluate.suites.longbench.longbench_prompts import cut_middle, is_published
from endprompt_megatron.evaluate.suites.longbench.longbench_tasks import (
    EXTENDED_TASKS,
    GROUPS,
    NOT_CHINESE,
    TASKS,
)
from endprompt_megatron.tokenizer import load_tokenizer

RECORDS = Path(__file__).resolve().parent.parent / "longbench"
SETTINGS = LongBenchSettings(data=RECORDS, max_length=100_000)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tokenizer that puts nothing before a text."""
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=400)


@pytest.fixture(scope="module")
def bos_directory(tmp_path_factory):
    """The same with BOS before a text, as LLaMA's."""
    from tokenizers import Tokenizer, processors

    directory = small_tokenizer(tmp_path_factory.mktemp("bos"), vocab_size=400)
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    bos = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    backend.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def copy(tmp_path):
    """The records in a directory that a test may damage."""
    return Path(shutil.copytree(RECORDS, tmp_path / "longbench"))


@pytest.fixture
def extended(copy):
    """LongBench-E's layout: the records as NAME_e.jsonl, the second one of each task long, of the third length."""
    for name in EXTENDED_TASKS:
        lines = (copy / "data" / f"{name}.jsonl").read_text().splitlines()
        changed = [{**json.loads(line), "length": length} for line, length in zip(lines, (3999, 8000), strict=True)]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in changed)
        (copy / "data" / f"{name}_e.jsonl").write_text(text)
        (copy / "data" / f"{name}.jsonl").unlink()
    return LongBenchSettings(data=copy, max_length=100_000, extended=True)


def as_the_original_asks(tokenizer, record, template, max_length, build_chat):
    """Ids that pred.py gives to the model: its calls of transformers' tokenizer, in its order."""
    prompt = template.format(**record)
    ids = tokenizer(prompt, truncation=False).input_ids
    if len(ids) > max_length:
        half = int(max_length / 2)
        first, last = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
        prompt = first + last
    if build_chat:
        prompt = build_chat(prompt)
    return tokenizer(prompt, truncation=False).input_ids


def test_the_table_of_tasks_is_longbenchs():
    assert len(TASKS) == 21
    assert len(EXTENDED_TASKS) == 13
    assert sum(task.size for task in TASKS.values()) == 4750
    # The weights of the groups in the paper's mean, and in the mean of all.
    assert [sum(TASKS[name].group == group for name in NOT_CHINESE) for group in GROUPS] == [3, 3, 3, 3, 2, 2]
    assert [sum(task.group == group for task in TASKS.values()) for group in GROUPS] == [4, 4, 4, 4, 3, 2]


def test_the_paper_mean_follows_from_its_groups():
    values = dict(zip(GROUPS, (32.03, 30.81, 26.04, 68.04, 4.54, 66.48), strict=True))
    assert sum(values[TASKS[name].group] for name in NOT_CHINESE) / 16 == pytest.approx(38.30, abs=0.005)


@pytest.mark.parametrize(("window", "length"), [(4096, 3500), (8192, 7500), (16384, 15500), (32768, 31500)])
def test_longbench_prompts_leave_as_many_tokens_as_the_original(window, length):
    assert default_max_length(window) == length


@pytest.mark.parametrize("which", ["directory", "bos_directory"])
@pytest.mark.parametrize("max_length", [100_000, 301, 120])
@pytest.mark.parametrize("wrapper", [None, "[INST]{prompt}[/INST]"])
def test_longbench_prompts_equal_the_originals(which, max_length, wrapper, request):
    from transformers import AutoTokenizer

    directory = request.getfixturevalue(which)
    original = AutoTokenizer.from_pretrained(directory)
    settings = LongBenchSettings(data=RECORDS, max_length=max_length, chat=wrapper)
    templates = json.loads((RECORDS / "config" / "dataset2prompt.json").read_text())
    asked = 0
    for question in samples(settings, load_tokenizer(directory)):
        lines = (RECORDS / "data" / f"{question.task}.jsonl").read_text().splitlines()
        record = json.loads(lines[question.number])
        few_shot_or_code = question.task in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
        chat = None if few_shot_or_code or wrapper is None else lambda prompt: f"[INST]{prompt}[/INST]"
        wanted = as_the_original_asks(original, record, templates[question.task], max_length, chat)
        assert question.prompt == wanted, question.task
        assert question.extra["cut"] == (max_length < 1000)
        assert question.references == record["answers"]
        asked += 1
    assert asked == 42


def test_a_longbench_prompt_cut_in_the_middle_keeps_both_ends(directory):
    tokenizer = load_tokenizer(directory)
    text = "The beginning stays. " + "the middle goes " * 200 + "and so does the end."
    short, cut = cut_middle(tokenizer, text, 60)
    assert cut
    assert len(tokenizer.encode(short)) <= 62  # encoded again, the seam may give a token more
    assert short.startswith("The beginning")
    assert short.endswith("does the end.")
    assert cut_middle(tokenizer, text, len(tokenizer.encode(text))) == (text, False)


def test_a_chat_template_stands_around_the_prompt_alone(directory, tmp_path):
    chatty = Path(shutil.copytree(directory, tmp_path / "chatty"))
    with pytest.raises(InputError, match="has no chat template"):
        chat_wrapper(chatty)
    (chatty / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert chat_wrapper(chatty) == "<user>{prompt}<|eot_id|><assistant>"


def test_directory_and_archive_give_the_same_questions(directory, tmp_path):
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted((RECORDS / "data").iterdir()):
            file.write(path, f"data/{path.name}")
    shutil.copy(RECORDS / "config" / "dataset2prompt.json", tmp_path)
    tokenizer = load_tokenizer(directory)
    expected = list(samples(SETTINGS, tokenizer))
    assert list(samples(replace(SETTINGS, data=archive), tokenizer)) == expected
    prompts = RECORDS / "config" / "dataset2prompt.json"
    plain = replace(SETTINGS, data=RECORDS / "data", prompts=prompts)
    assert list(samples(plain, tokenizer)) == expected
    assert [(q.suite, q.task, q.length, q.number) for q in expected] == [
        ("longbench", name, 100_000, number) for name in TASKS for number in (0, 1)
    ]


def test_longbench_limit_and_tasks_select_questions(directory):
    settings = replace(SETTINGS, tasks=("trec", "qasper"), limit=1)
    asked = list(samples(settings, load_tokenizer(directory)))
    assert [(question.task, question.number) for question in asked] == [("qasper", 0), ("trec", 0)]
    assert check(settings) == {"qasper": 1, "trec": 1}
    assert check(SETTINGS) == dict.fromkeys(TASKS, 2)


def test_a_perfect_model_scores_100_and_a_silent_one_0_on_every_task(directory):
    asked = list(samples(SETTINGS, load_tokenizer(directory)))
    perfect = summary([(question, score(question, question.references[0])) for question in asked])
    assert {name: entry["score"] for name, entry in perfect["tasks"].items()} == dict.fromkeys(TASKS, 100.0)
    assert perfect["mean_16"]["score"] == pytest.approx(100)
    assert perfect["mean_21"]["score"] == pytest.approx(100)
    silent = summary([(question, score(question, "")) for question in asked])
    assert {name: entry["score"] for name, entry in silent["tasks"].items()} == dict.fromkeys(TASKS, 0.0)
    assert silent["mean_16"]["score"] == silent["mean_21"]["score"] == 0
    assert all(group["all"]["score"] == 0 for group in silent["groups"].values())


def test_few_shot_answers_end_with_their_line_and_others_do_not(directory):
    for question in samples(SETTINGS, load_tokenizer(directory)):
        answer = question.references[0]
        if question.task in ("trec", "triviaqa", "samsum", "lsht"):
            assert score(question, f"\n\n{answer}\nDialogue: {' '.join(map(str, range(50)))}") > 0.99
        elif TASKS[question.task].metric in ("f1", "rouge_l"):
            assert score(question, f"{answer}\n{' '.join(map(str, range(50)))}") < 0.9


def test_means_weigh_tasks_alike_and_say_what_they_lack(directory):
    asked = [question for question in samples(SETTINGS, load_tokenizer(directory)) if question.task != "trec"]
    values = {name: index / 40 for index, name in enumerate(TASKS)}
    table = summary([(question, "an answer", values[question.task]) for question in asked])
    english = [100 * values[name] for name in NOT_CHINESE if name != "trec"]
    assert table["mean_16"]["score"] == pytest.approx(sum(english) / 15)
    assert table["mean_16"]["missing"] == table["mean_21"]["missing"] == table["missing"] == ["trec"]
    assert table["mean_16"]["complete"] is False
    assert "qasper" in table["mean_16"]["short"]  # 2 questions of 200
    few_shot = table["groups"]["few_shot"]
    assert few_shot["not_chinese"]["score"] == pytest.approx(50 * (2 * 13 + 1) / 40)
    assert few_shot["all"]["score"] == pytest.approx(100 * (13 + 14 + 15) / 3 / 40)
    assert few_shot["not_chinese"]["missing"] == ["trec"]


def test_a_longbench_mean_over_all_tasks_is_complete(directory):
    one = {question.task: question for question in samples(replace(SETTINGS, limit=1), load_tokenizer(directory))}
    scored = [(one[name], 0.5) for name, task in TASKS.items() for _ in range(task.size)]
    table = summary(scored)
    for mean in (table["mean_16"], table["mean_21"], *table["groups"]["code"].values()):
        assert mean == {"score": 50.0, "complete": True, "missing": [], "short": []}


def test_longbench_has_no_mean_of_no_scores():
    assert summary([])["mean_16"]["score"] is None
    assert summary([])["missing"] == list(TASKS)


def test_own_prompts_are_not_passed_off_as_the_published_ones(directory):
    asked = list(samples(replace(SETTINGS, tasks=("lcc", "trec")), load_tokenizer(directory)))
    assert summary([(question, 1.0) for question in asked])["prompts"] == "not the published ones: lcc, trec"
    published = [replace(question, extra={**question.extra, "published_prompt": True}) for question in asked]
    assert summary([(question, 1.0) for question in published])["prompts"] == "published"
    assert not is_published(TASKS["lcc"], "{context}")
    prompts = RECORDS / "config" / "dataset2prompt.json"
    assert sources(SETTINGS) == {"data": RECORDS, "prompts": prompts, "published_prompts": False}


def test_longbench_e_is_scored_by_length(extended, directory):
    asked = list(samples(extended, load_tokenizer(directory)))
    assert len(asked) == 26
    assert {question.suite for question in asked} == {"longbench_e"}
    table = summary([(question, 0.25 if question.number else 1.0) for question in asked])
    assert table["by_words"]["qasper"] == {"0-4k": 100.0, "4-8k": None, "8k+": 25.0}
    assert table["by_words"]["mean"] == {"0-4k": 100.0, "4-8k": None, "8k+": 25.0}
    assert table["tasks"]["qasper"]["score"] == 62.5
    assert table["tasks"]["qasper"]["published_questions"] == 224
    assert table["mean_13"]["score"] == 62.5
    with pytest.raises(InputError, match=r"LongBench-E: there is no task 'musique'"):
        check(replace(extended, tasks=("musique",)))


DAMAGE = {
    "not JSON": ("qasper", lambda record: b'{"input": ', ("qasper.jsonl, line 2", "is not JSON")),
    "not UTF-8": ("qasper", lambda record: b'{"input": "\xff"}', ("qasper.jsonl, line 2", "is not JSON in UTF-8")),
    "not an object": ("qasper", lambda record: b"[1]", ("line 2", "should be a JSON object, is list")),
    "a field is missing": (
        "lsht",
        lambda record: {key: value for key, value in record.items() if key != "context"},
        ("lsht.jsonl, line 2", '"context" is missing', "should be a text"),
    ),
    "a field of another type": ("lcc", lambda record: {**record, "input": 3}, ("line 2", '"input" is 3')),
    "no length": ("lcc", lambda record: {**record, "length": "long"}, ("line 2", '"length" is "long"')),
    "no answers": ("lcc", lambda record: {**record, "answers": []}, ("line 2", '"answers" is []')),
    "an answer that is none": ("lcc", lambda record: {**record, "answers": [None]}, ("line 2", '"answers" is [null]')),
    "no classes": ("trec", lambda record: {**record, "all_classes": None}, ("line 2", '"all_classes"', "trec needs")),
    "no paragraph": (
        "passage_retrieval_zh",
        lambda record: {**record, "answers": ["Paragraph 1"]},
        ("line 2", 'has "Paragraph 1"', "段落1"),
    ),
    "half a character": (
        "qasper",
        lambda record: json.dumps({**record, "context": "\ud800"}).encode(),
        ("line 2", "half a character at 0"),
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("packed", [False, True], ids=["directory", "archive"])
def test_a_damaged_record_is_named_before_the_first_question(what, packed, copy, directory):
    task, damage, needles = DAMAGE[what]
    file = copy / "data" / f"{task}.jsonl"
    first, second = file.read_bytes().splitlines()
    damaged = damage(json.loads(second))
    file.write_bytes(first + b"\n" + (damaged if isinstance(damaged, bytes) else json.dumps(damaged).encode()) + b"\n")
    data = copy
    if packed:
        data = copy / "data.zip"
        with zipfile.ZipFile(data, "w") as archive:
            for path in (copy / "data").iterdir():
                archive.write(path, f"data/{path.name}")
    with pytest.raises(InputError) as caught:
        samples(replace(SETTINGS, data=data), load_tokenizer(directory))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(data))
    for needle in needles:
        assert needle in message


def refused(settings: LongBenchSettings) -> str:
    with pytest.raises(InputError) as caught:
        check(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_tasks_are_named_together(copy):
    for name in ("trec", "lcc"):
        (copy / "data" / f"{name}.jsonl").unlink()
    message = refused(replace(SETTINGS, data=copy))
    assert "2 of 21 files are missing: trec.jsonl, lcc.jsonl" in message
    assert check(replace(SETTINGS, data=copy, tasks=("qasper",))) == {"qasper": 2}


def test_a_path_without_longbench_data_is_refused(copy, tmp_path):
    assert "no such file or directory" in refused(replace(SETTINGS, data=tmp_path / "nowhere"))
    (tmp_path / "data.zip").write_text("not a zip")
    assert "cannot be read as a zip archive" in refused(replace(SETTINGS, data=tmp_path / "data.zip"))
    assert "21 of 21 files are missing" in refused(replace(SETTINGS, data=tmp_path))
    (copy / "data" / "trec.jsonl").write_text("")
    assert "trec.jsonl: holds no records" in refused(replace(SETTINGS, data=copy))


def test_an_archive_that_was_cut_or_damaged_is_refused(tmp_path):
    data = tmp_path / "data.zip"
    with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as archive:
        archive.write(RECORDS / "data" / "lcc.jsonl", "data/lcc.jsonl")
    whole = data.read_bytes()
    settings = replace(SETTINGS, data=data, tasks=("lcc",), prompts=RECORDS / "config" / "dataset2prompt.json")
    assert check(settings) == {"lcc": 2}
    data.write_bytes(whole.replace(b"width", b"wdith", 1))
    assert "data/lcc.jsonl: cannot be read after line" in refused(settings)
    data.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as a zip archive" in refused(settings)


def test_longbench_prompt_texts_are_required_and_checked(copy):
    file = copy / "config" / "dataset2prompt.json"
    texts = json.loads(file.read_text())
    settings = replace(SETTINGS, data=copy)
    file.write_text(json.dumps({**texts, "lcc": None}))
    assert "has no prompt for lcc" in refused(settings)
    file.write_text(json.dumps({**texts, "lcc": "{context} {question}"}))
    assert "has the field {question}; use {context} and {input}" in refused(settings)
    file.write_text(json.dumps({**texts, "lcc": "{context} {"}))
    assert "the prompt for lcc cannot be read" in refused(settings)
    file.unlink()
    assert "no dataset2prompt.json beside it" in refused(settings)
    assert "no such file" in refused(replace(settings, prompts=copy / "mine.json"))


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ({"tasks": ("trek",)}, "there is no task 'trek'; its tasks are narrativeqa, "),
        ({"tasks": ()}, "no tasks"),
        ({"max_length": 1}, "prompts of 1 tokens"),
        ({"limit": 0}, "0 questions a task"),
        ({"chat": "[INST]"}, "should hold {prompt} once"),
    ],
)
def test_longbench_settings_that_cannot_be_used_are_refused(change, needle):
    assert needle in refused(replace(SETTINGS, **change))


def test_a_window_too_small_for_the_answers_is_refused():
    with pytest.raises(InputError, match="a window of 512 tokens is too small"):
        default_max_length(512)
