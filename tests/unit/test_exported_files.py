"""What an exported model's small files say after training: its window, and where its turns end."""

import json
from pathlib import Path

import numpy as np
import pytest
from chat_files import TEMPLATES, chat_tokenizer, conversations, write_chats
from small import edit_json, small_llama
from unit.preparing import stored_documents

from endprompt_megatron.config.recipe import Data, Model, Recipe
from endprompt_megatron.convert.exported_files import exported_files
from endprompt_megatron.data.corpus.prepare import prepare
from endprompt_megatron.tokenizer.chat_template import ChatTemplate


def recipe(hf: Path, kind: str = "text") -> Recipe:
    return Recipe(model=Model(hf=str(hf)), data=Data(kind=kind))


@pytest.fixture
def hf(tmp_path) -> Path:
    """A model with a window of 256 whose export has one of 1024, its files as transformers writes them."""
    return small_llama(tmp_path / "hf", max_position_embeddings=256)


def exported(hf: Path, kind: str = "text") -> dict[str, dict]:
    config = json.loads((hf / "config.json").read_text()) | {"max_position_embeddings": 1024}
    return exported_files(recipe(hf, kind), config, "recipe.yaml")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_fine_tuned_model_stops_where_its_answers_were_taught_to_end(hf, tmp_path, template):
    chat_tokenizer(hf, TEMPLATES[template])
    out = str(tmp_path / "train")
    prepare(
        [write_chats(tmp_path / "chats.jsonl", conversations(20))], str(hf), out, chat="auto", workers=1, skip_bad=True
    )
    masks = np.fromfile(f"{out}.mask.bin", np.uint8)
    tokens = np.concatenate([np.asarray(each) for each in stored_documents(Path(out))])
    taught = set(
        tokens[np.flatnonzero(np.diff([*masks.astype(int), 0]) == -1)].tolist()
    )  # the last of every run of ones
    before = json.loads((hf / "generation_config.json").read_text())["eos_token_id"]
    files = exported(hf, "chat")
    for name in ("config.json", "generation_config.json"):
        ends = files[name]["eos_token_id"]
        ends = ends if isinstance(ends, list) else [ends]
        assert set(ends) == taught | {before}
        assert len(ends) == len(set(ends))


def test_ends_of_a_model_trained_on_texts_stay(hf):
    files = exported(hf)
    assert "generation_config.json" not in files
    assert files["config.json"]["eos_token_id"] == json.loads((hf / "config.json").read_text())["eos_token_id"]


def test_a_model_without_a_generation_config_gets_one_that_stops(hf):
    chat_tokenizer(hf, TEMPLATES["chatml"])
    (hf / "generation_config.json").unlink()
    edit_json(hf / "config.json", eos_token_id=None)
    files = exported(hf, "chat")
    assert isinstance(files["generation_config.json"]["eos_token_id"], int)
    assert files["generation_config.json"]["eos_token_id"] == files["config.json"]["eos_token_id"]


@pytest.mark.parametrize(("length", "expected"), [(256, 1024), (1024, None), (4096, None), (10**30, None), (20, None)])
def test_files_that_name_the_old_window_name_the_new_one(hf, length, expected):
    edit_json(hf / "generation_config.json", max_length=length)
    edit_json(hf / "tokenizer_config.json", model_max_length=length)
    files = exported(hf)
    assert files.get("generation_config.json", {}).get("max_length") == expected
    assert files.get("tokenizer_config.json", {}).get("model_max_length") == expected


def test_a_template_that_takes_one_question_alone_says_how_it_ends():
    source = (
        "{% if messages|length > 2 %}{{ raise_exception('one question') }}{% endif %}"
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<e>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert ChatTemplate(source, (), ("<e>", "<x><e>")).turn_ends() == ["<e>"]
