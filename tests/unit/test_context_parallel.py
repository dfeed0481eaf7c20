"""What context-parallel ranks hold is one and the same slice of everything: gathered, it is the whole sample."""

import pytest
import torch
from small import scaled_config, small_llama

from endprompt_megatron.common.files import read_json
from endprompt_megatron.data.samples.batches import KEYS
from endprompt_megatron.method.positions import MAPS, position_ids, segment_lengths
from endprompt_megatron.method.rope import PositionRotary, transformers_config
from endprompt_megatron.model.context_parallel import zigzag_slice
from endprompt_megatron.model.loss import weighted_loss

TARGET, PHYSICAL, PROMPT = 65536, 48, 8
ROPES = ("linear", "ntk", "yarn", "llama3", "none")


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("model"))


def batch(method: str, rows: int = 3) -> dict[str, torch.Tensor]:
    """Samples [b, s] of random tokens with the method's positions, weights and marks."""
    target = PHYSICAL if method == "full" else TARGET
    a, b = segment_lengths(method, PHYSICAL, PROMPT, target)
    positions = [position_ids(method, a, b, target, index=row, seed=1) for row in range(rows)]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 300, (rows, a + b), generator=generator)
    weights = torch.rand(rows, a + b, generator=generator)
    mask = (torch.arange(1, a + b + 1) >= a).expand(rows, -1) & bool(b)
    values = (tokens, tokens.roll(-1, 1), torch.stack([torch.from_numpy(p) for p in positions]), weights, mask)
    return dict(zip(("tokens", "labels", "position_ids", "loss_weights", "prompt_mask"), values, strict=True))


def gathered(shares: list[torch.Tensor], dim: int) -> torch.Tensor:
    """The whole sequence from the ranks' shares, written out apart from zigzag_slice."""
    halves = [share.chunk(2, dim) for share in shares]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("method", MAPS)
def test_zigzag_shares_gathered_are_the_complete_sample(method, size):
    whole = batch(method)
    assert set(whole) == set(KEYS)
    for key, value in whole.items():
        assert torch.equal(gathered([zigzag_slice(value, rank, size, dim=1) for rank in range(size)], 1), value), key


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("method", ["end_prompt", "end_prompt_random", "pose"])
def test_rotary_angles_come_from_the_sliced_positions(hf, method, rope, size):
    config = read_json(hf / "config.json", "config")
    scaled = scaled_config(config, rope, TARGET / 64, 64, TARGET)
    rotary = PositionRotary(transformers_config(scaled), head_dim=16)
    positions = batch(method)["position_ids"]
    shares = []
    for rank in range(size):
        rotary.position_ids = zigzag_slice(positions, rank, size, dim=1)
        shares.append(rotary(PHYSICAL))
    assert torch.equal(gathered(shares, 0), rotary.rotary_angles(positions))  # [s, b, 1, d] float32


@pytest.mark.parametrize("size", [2, 4])
def test_weighted_loss_is_the_sum_over_zigzag_shares(size):
    """The loss is normalised over all ranks: parts divided by the whole weight add up to it."""
    whole = batch("end_prompt")
    losses = torch.rand(whole["tokens"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = whole["loss_weights"].double()
    total = weights.sum()
    parts = [
        weighted_loss(zigzag_slice(losses, rank, size, 1), zigzag_slice(weights, rank, size, 1), total)
        for rank in range(size)
    ]
    assert float(sum(parts)) == pytest.approx(float((losses * weights).sum() / total), rel=1e-6)
