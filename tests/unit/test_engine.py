"""The transformers engine against full-mask forwards that take no shortcut."""

import numpy as np
import pytest
import small
import torch

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.engines.transformers_engine import TransformersEngine

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


def random_tokens(batch, length, seed=0):
    return np.random.default_rng(seed).integers(3, 300, (batch, length))


def reference_logits(model, tokens, position_ids, visible=None):
    """Every row sees all physical predecessors, or what `visible` [s, s] says: an additive 4D mask, no shortcuts."""
    tokens, position_ids = torch.as_tensor(tokens), torch.as_tensor(position_ids)
    length = tokens.shape[1]
    visible = torch.ones(length, length).tril().bool() if visible is None else visible
    mask = torch.zeros(tokens.shape[0], 1, length, length).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        return model(tokens, attention_mask=mask, position_ids=position_ids, use_cache=False).logits


def reference_losses(model, tokens, position_ids, visible=None):
    logits = reference_logits(model, tokens, position_ids, visible)[:, :-1]
    targets = torch.as_tensor(tokens)[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).numpy(), (logits.argmax(-1) == targets).numpy()


def natural(tokens):
    return np.tile(np.arange(tokens.shape[1]), (tokens.shape[0], 1))


@pytest.mark.parametrize("rope", [None, YARN, DYNAMIC], ids=["default", "yarn", "dynamic"])
def test_losses_equal_a_full_mask_forward(tmp_path, rope):
    directory = small.small_llama(tmp_path / "model", **({"rope_parameters": rope} if rope else {}))
    engine, tokens = TransformersEngine(directory, "cpu", dtype="float32"), random_tokens(2, 90)
    losses, correct = engine.token_losses(tokens)
    fresh = TransformersEngine(directory, "cpu", dtype="float32").model
    expected, expected_correct = reference_losses(fresh, tokens, natural(tokens))
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    assert losses.dtype == np.float32
    assert (correct == expected_correct).all()


def test_jumped_positions_see_the_context_and_not_the_packed_sequence_trap(engine):
    tokens = random_tokens(1, 48)
    positions = np.concatenate([np.arange(32), np.arange(200, 216)])[None]
    losses, _ = engine.token_losses(tokens, positions)
    expected, _ = reference_losses(engine.model, tokens, positions)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    # What transformers does without a mask: the tail is cut off from the context.
    with torch.inference_mode():
        trapped = engine.model(
            torch.as_tensor(tokens), position_ids=torch.as_tensor(positions), attention_mask=None, use_cache=False
        ).logits
    apart = torch.ones(48, 48).tril().bool()
    apart[32:, :32] = False
    cut_off = reference_logits(engine.model, tokens, positions, apart)
    if torch.allclose(trapped, cut_off, atol=1e-4):  # some versions of transformers do not have the trap
        assert not np.allclose(reference_losses(engine.model, tokens, positions, apart)[0], losses, atol=1e-2)
    assert not torch.allclose(cut_off, reference_logits(engine.model, tokens, positions), atol=1e-2)


@pytest.mark.parametrize("chunk", [1, 7, 32, 89])
@pytest.mark.parametrize("jump", [False, True], ids=["natural", "jumped"])
def test_reading_an_input_in_chunks_equals_reading_it_whole(model_dir, engine, chunk, jump):
    tokens = random_tokens(2, 90)
    positions = natural(tokens)
    if jump:
        positions[:, 60:] += 1000
    chunks = TransformersEngine(model_dir, "cpu", dtype="float32", whole=0, chunk=chunk)
    losses, correct = chunks.token_losses(tokens, positions)
    whole, whole_correct = engine.token_losses(tokens, positions)
    np.testing.assert_allclose(losses, whole, rtol=1e-5, atol=1e-5)
    assert (correct == whole_correct).all()
    np.testing.assert_allclose(chunks.token_losses(tokens, positions, last=40)[0], whole[:, -40:], rtol=1e-5, atol=1e-5)


def test_scoring_only_the_last_tokens_gives_the_same_losses(engine):
    tokens = random_tokens(2, 64)
    whole, _ = engine.token_losses(tokens)
    for last in (1, 10, 63, 500):
        losses, correct = engine.token_losses(tokens, last=last)
        assert losses.shape == correct.shape == (2, min(last, 63))
        np.testing.assert_allclose(losses, whole[:, -last:], rtol=1e-6, atol=1e-6)


def test_dynamic_rope_does_not_depend_on_what_was_read_before(tmp_path):
    directory = small.small_llama(tmp_path / "model", rope_parameters=DYNAMIC)
    engine = TransformersEngine(directory, "cpu", dtype="float32", whole=16, chunk=16)
    middle, long = random_tokens(1, 100), random_tokens(1, 300)
    before, _ = engine.token_losses(middle)
    engine.token_losses(long)
    np.testing.assert_array_equal(before, engine.token_losses(middle)[0])


@pytest.mark.parametrize("whole", [0, 4096], ids=["chunks", "whole"])
def test_greedy_answers_and_their_scores_equal_repeated_full_forwards(model_dir, whole):
    engine = TransformersEngine(model_dir, "cpu", dtype="float32", whole=whole, chunk=16)
    engine.end_ids = set()
    prompt, expected = random_tokens(1, 50)[0].tolist(), [7, 8, 9]
    answer = engine.answer(prompt, expected, 6)
    ids = list(prompt)
    for _ in range(6):
        ids.append(int(reference_logits(engine.model, [ids], natural(np.asarray([ids])))[0, -1].argmax()))
    assert answer.generated == ids[50:]
    assert engine.generate(prompt, 6) == ids[50:]
    forced = np.asarray([prompt + expected])
    logprobs = reference_logits(engine.model, forced, natural(forced))[0, 49:52].log_softmax(-1)
    np.testing.assert_allclose(answer.logprobs, logprobs[range(3), expected], rtol=1e-4, atol=1e-5)
    ranks = [(int((row > row[token]).sum())) for row, token in zip(logprobs, expected, strict=True)]
    assert answer.ranks.tolist() == ranks
    engine.end_ids = {ids[52]}
    assert engine.generate(prompt, 6) == ids[50 : 50 + ids[50:].index(ids[52])]


def test_greedy_ties_go_to_the_first_token(model_dir):
    engine = TransformersEngine(model_dir, "cpu", dtype="float32")
    engine.model.lm_head.weight.data.zero_()
    losses, correct = engine.token_losses(np.asarray([[5, 0, 1, 0]]))
    np.testing.assert_allclose(losses, np.log(320), rtol=1e-6)
    assert correct.tolist() == [[True, False, True]]


def test_missing_weights_are_refused_not_filled_with_random_numbers(tmp_path):
    from safetensors.torch import load_file, save_file

    directory = small.small_llama(tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights are missing, among them model\.layers\.2\.mlp\.up_proj"):
        TransformersEngine(directory, "cpu")


def test_weights_that_are_not_finite_are_an_input_error(model_dir):
    engine = TransformersEngine(model_dir, "cpu", dtype="float32")
    engine.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        engine.token_losses(random_tokens(1, 8))


def test_token_ids_outside_the_vocabulary_are_an_input_error(engine):
    with pytest.raises(InputError, match="token id 320 is outside its vocabulary of 320"):
        engine.token_losses(np.asarray([[1, 320]]))
