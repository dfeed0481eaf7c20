"""Fine-tuning on conversations: rows and their weights, rules, the RoPE that stays, and a whole small run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from chat_files import CHATML, chat_tokenizer, conversations, write_chats
from small import assert_one_line_error, edit_json, scaled_config, small_llama
from unit.preparing import stored_documents
from unit.starting import write_tokens

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.constraints.check import check_data, check_for
from endprompt_megatron.config.load import load_recipe
from endprompt_megatron.data.corpus.prepare import prepare
from endprompt_megatron.data.describe.describe_data import look, look_at_documents, page
from endprompt_megatron.data.describe.segments import segments
from endprompt_megatron.data.samples.of_recipe import datasets_of
from endprompt_megatron.distributed.hardware import Hardware
from endprompt_megatron.method.rope import frequencies, transformers_config
from endprompt_megatron.model.shape import read_shape
from endprompt_megatron.tokenizer import load_tokenizer

SCALED = {"max_position_embeddings": 512, "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}}
RECIPE = """
model: {hf: hf, init_from: hf}
context: {method: short, target: 512, physical: 96, rope: {type: keep}}
data: {train: chats, kind: chat, packing: documents}
train: {steps: 3, global_batch_size: 4}
optim: {lr: 1.0e-3, warmup_steps: 0}
precision: {dtype: float32}
checkpoint: {dir: run, interval: 3}
log: {tensorboard: false}
"""


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A model of window 64 extended to 512, with a chat template; conversations, prepared, and texts."""
    root = tmp_path_factory.mktemp("sft")
    small_llama(root / "hf", tokenizer=False, **SCALED)
    chat_tokenizer(root / "hf")
    prepare([write_chats(root / "chats.jsonl", conversations(40))], str(root / "hf"), str(root / "chats"), chat="auto")
    write_tokens(root / "texts", 500)
    (root / "recipe.yaml").write_text(RECIPE)
    return root


@pytest.fixture
def place(ground, monkeypatch) -> Path:
    monkeypatch.chdir(ground)
    return ground


def dataset_of(*overrides: str):
    recipe = load_recipe("recipe.yaml", overrides)
    check_data(recipe, "recipe.yaml")
    return datasets_of(recipe, "recipe.yaml", 320, None, valid_samples=4)


def test_a_packed_row_of_conversations_weighs_only_their_answers(place):
    ids, masks = stored_documents("chats"), stored_documents("chats.mask")
    train, _ = dataset_of("train.steps=8", "data.align=4")
    seen = set()
    for number in range(len(train)):
        row = {key: value.numpy() for key, value in train[number].items()}
        bounds, taken = row["cu_seqlens"], train.excerpts(number)
        for (document, length, first, count, at), start in zip(taken, bounds, strict=False):
            assert (length, first, count, at) == (len(ids[document]), 0, len(ids[document]), start)
            inside = slice(at, at + count)
            assert row["tokens"][inside].tolist() == ids[document]
            assert row["position_ids"][inside].tolist() == list(range(count))
            assert row["labels"][inside].tolist() == [*ids[document][1:], 0]
            assert row["loss_weights"][inside].tolist() == [*masks[document][1:], 0]
            row["loss_weights"][inside] = 0
            seen.add(document)
        assert not row["loss_weights"].any()
        assert not row["prompt_mask"].any()
    fitting = {number for number, each in enumerate(ids) if len(each) <= 96}
    assert seen == fitting
    assert len(fitting) < 40


def test_long_conversations_are_left_out_or_cut_and_counted(place):
    ids, masks = stored_documents("chats"), stored_documents("chats.mask")
    most = 62
    long = [number for number, each in enumerate(ids) if len(each) > most]
    kept = [number for number in long if any(masks[number][1:most])]
    assert 0 < len(kept) < len(long) < 40
    dropped, _ = dataset_of(f"context.physical={most}", "train.steps=12")
    assert f"of {len(long)} conversations longer than 62 tokens {len(long)} left out" in dropped.describe()
    cut, _ = dataset_of(f"context.physical={most}", "train.steps=12", "data.long=cut")
    said = f"{len(kept)} cut, {len(long) - len(kept)} left out"
    assert f"of {len(long)} conversations longer than 62 tokens {said}" in cut.describe()
    counts = {"dropped": dropped.rows.counts, "cut": cut.rows.counts}
    assert counts["dropped"].samples == 40 - len(long)
    assert counts["cut"].samples == 40 - len(long) + len(kept)
    row = next(n for n in range(len(cut)) if any(piece[0] in kept for piece in cut.excerpts(n)))
    [(document, length, first, count, at)] = [piece for piece in cut.excerpts(row) if piece[0] in kept]
    assert (length, first, count) == (len(ids[document]), 0, most)
    assert cut[row]["tokens"][at : at + most].tolist() == ids[document][:most]
    with pytest.raises(InputError, match=r"none of 40 conversations fits into context.physical=8; raise it, or cut"):
        dataset_of("context.physical=8")


def test_rows_of_conversations_come_from_the_cache_of_their_settings(place, tmp_path):
    recipe = load_recipe("recipe.yaml", ["data.valid=3,1", "data.long=cut", "context.physical=72"])
    for _ in range(2):
        train, valid = datasets_of(recipe, "recipe.yaml", 320, tmp_path / "cache", valid_samples=2)
        assert {piece[0] for n in range(len(train)) for piece in train.excerpts(n)} <= set(range(30))
        assert {piece[0] for n in range(len(valid)) for piece in valid.excerpts(n)} <= set(range(30, 40))
        assert any(train[n]["loss_weights"].any() for n in range(len(train)))
    other = load_recipe("recipe.yaml", ["data.valid=3,1", "context.physical=72"])
    train, _ = datasets_of(other, "recipe.yaml", 320, tmp_path / "cache", valid_samples=2)
    assert "left out" in train.describe()
    assert "cut" not in train.describe()


def test_segments_of_conversations_tell_answers_from_unsupervised_tokens(place):
    train, _ = dataset_of("data.align=8")
    masks = stored_documents("chats.mask")
    row = train[0]
    kinds = np.full(96, "padding", dtype=object)
    for segment in segments(row):
        kinds[segment.start : segment.stop] = segment.kind
    for document, _, _, count, at in train.excerpts(0):
        assert (kinds[at : at + count] == ["answer" if one else "context" for one in masks[document]]).all()
        kinds[at : at + count] = "padding"
    assert (kinds == "padding").all()


REFUSED = {
    "kind": (["data.kind=talk"], ["data.kind=talk", "text, chat"]),
    "stream": (["data.packing=stream"], ["data.packing=stream", "use packing=documents"]),
    "method": (["context.method=end_prompt"], ["context.method=end_prompt", "use method=short"]),
    "probe": (["train.virtual_distances=[128]", "data.valid=9,1"], ["train.virtual_distances=[128]", "leave it out"]),
    "long": (["data.long=keep"], ["data.long=keep", "drop, cut"]),
    "long-text": (["data.kind=text", "data.long=cut"], ["data.long=cut", "data.kind=chat"]),
    "factor": (["context.rope.factor=8"], ["context.rope.factor=8", "leave the factor out"]),
    "original": (["context.original=64"], ["context.original=64", "nothing is extended"]),
    "window": (["context.target=1024"], ["context.target=1024", "window of hf is 512"]),
    "texts": (["data.train=texts"], ["data.train=texts holds texts", "tools/prepare_data.py --chat"]),
    "not-asked": (["data.kind=text"], ["data.train=chats holds conversations", "set data.kind=chat"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_conversations_do_not_support_are_refused(place, name):
    overrides, needles = REFUSED[name]

    def run():
        recipe = load_recipe("recipe.yaml", overrides)
        cpu = Hardware(gpu=None, te=None)
        check_for(recipe, "recipe.yaml", read_shape("hf"), world_size=1, hardware=cpu)
        datasets_of(recipe, "recipe.yaml", 320, None)

    with pytest.raises(InputError) as error:
        run()
    for needle in needles:
        assert needle in str(error.value)


def test_conversations_without_their_mask_or_with_another_template_are_refused(ground, tmp_path, monkeypatch):
    for file in ground.glob("chats.*"):
        shutil.copy(file, tmp_path)
    shutil.copytree(ground / "hf", tmp_path / "hf")
    shutil.copy(ground / "recipe.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.mask.bin").rename(tmp_path / "away")
    with pytest.raises(InputError, match=r"chats.mask.bin: no such file"):
        dataset_of()
    shutil.copy(tmp_path / "chats.idx", tmp_path / "chats.mask.idx")
    shutil.copy(tmp_path / "chats.bin", tmp_path / "chats.mask.bin")
    with pytest.raises(InputError, match=r"chats.mask.idx: does not belong to chats.idx"):
        dataset_of()
    (tmp_path / "hf" / "chat_template.jinja").write_text(CHATML + "\n")
    with pytest.raises(InputError, match=r"model.hf=hf has another chat template, .* as chat_template.jinja"):
        dataset_of()
    (tmp_path / "hf" / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match=r"model.hf=hf has no chat template"):
        dataset_of()


SCALINGS = {
    "none": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
    "dynamic": {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 5e5},
    "yarn": {
        **{"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 5e5},
        **{"beta_fast": 16.0, "attention_factor": 1.1},
    },
    "llama3": {
        **{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        **{"original_max_position_embeddings": 64, "rope_theta": 5e5},
    },
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("form", ["transformers-5", "transformers-4"])
def test_rope_type_keep_trains_with_and_exports_the_models_own_scaling(name, form):
    rope = SCALINGS[name]
    given = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
    if form == "transformers-5":
        given["rope_parameters"] = rope
    else:
        own = {key: value for key, value in rope.items() if key != "rope_theta"}
        given |= {"rope_theta": 5e5, "rope_scaling": None if name == "none" else own}
    config = scaled_config(given, "keep", 1.0, 512, 512)
    assert config["rope_parameters"] == rope
    assert config["max_position_embeddings"] == 512
    assert scaled_config(config, "keep", 1.0, 512, 512) == config
    ours, theirs = (frequencies(transformers_config(each)) for each in (config, given))
    assert (ours[0] == theirs[0]).all()
    assert ours[1] == theirs[1]


def run_of(process, place: Path, *overrides: str) -> Path:
    """A run in its own process, exported: the Hugging Face directory."""
    from unit.starting import extend_here

    from endprompt_megatron.convert.to_hf import convert_megatron_to_hf

    name = f"run{len(list(place.glob('run*')))}"
    arguments = ["recipe.yaml", f"checkpoint.dir={name}", *overrides]
    code, _, err = process.run(1, extend_here, str(place), arguments, 1)[0]
    assert code == 0, err
    convert_megatron_to_hf(place / name / "checkpoints", place / f"{name}-hf")
    return place / f"{name}-hf"


def logits_of(directory: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 300, (1, 400)))
    with torch.no_grad():
        return model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits.numpy()


def test_fine_tuning_that_changes_no_weight_exports_the_model_that_it_began_with(process, place):
    # AdamW moves nothing that is not larger than the last bit of a float32.
    exported = run_of(process, place, "optim.lr=1.0e-30", "train.steps=1")
    before, after = (json.loads((path / "config.json").read_text()) for path in (place / "hf", exported))
    for key in ("rope_parameters", "max_position_embeddings"):
        assert after[key] == before[key]
    assert after["rope_scaling"] == {"type": "linear", "factor": 8.0}
    assert (logits_of(exported) == logits_of(place / "hf")).all()
    assert (exported / "chat_template.jinja").read_text() == CHATML
    card = (exported / "README.md").read_text()
    assert "supervised fine-tuning on conversations" in card
    assert "RoPE factor" not in card


def test_fine_tuning_takes_a_file_of_conversations_to_a_model_that_answers(process, place):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = run_of(process, place, "optim.lr=3.0e-3", "train.steps=3")
    run = exported.with_name(exported.name.removesuffix("-hf"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    train, _ = dataset_of()
    for line, rows in zip(lines, np.split(np.arange(12), 3), strict=True):
        assert line["targets"] == sum(int(train[row]["loss_weights"].sum()) for row in rows.tolist())
        assert line["loss"] == pytest.approx(line["loss_context"])
        assert line["loss_prompt"] is None
    assert lines[-1]["loss"] < lines[0]["loss"]
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported)
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    asked = tokenizer.apply_chat_template(conversations(2)[1][:1], **options)
    with torch.no_grad():
        answer = model.generate(**asked, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > asked["input_ids"].shape[1]


def test_inspect_data_shows_which_tokens_of_conversations_have_a_loss(place):
    recipe, tokenizer = load_recipe("recipe.yaml"), load_tokenizer("hf")
    dataset, _ = dataset_of()
    shown = page(look(recipe.context, recipe.data, dataset, tokenizer, 0, 2), recipe.data.document_ends)
    for needle in ("  answer: ", "  context: ", "of the tokens are answers, which alone have a loss", "<|im_end|>"):
        assert needle in shown, shown
    [fourth] = look_at_documents("chats", tokenizer, 3, 1)["documents"]
    assert fourth["answer_tokens"] == sum(stored_documents("chats.mask")[3])


def test_fine_tuning_beyond_the_models_window_is_refused(place, extend, tmp_path):
    shutil.copytree(place / "hf", tmp_path / "hf")
    edit_json(tmp_path / "hf" / "config.json", max_position_embeddings=64, rope_parameters=None)
    shutil.copy(place / "recipe.yaml", tmp_path)
    assert_one_line_error(extend(tmp_path, "recipe.yaml"), "context.target=512", "is 64: give the extended model")
