"""On two GPUs, over NCCL: each layout gives the losses and gradients of one GPU, and no rank outlives an error."""

import time

import pytest
from gpu.test_engine_gpu import FP8, compare, setup
from parallel.cases import join_gradients, losses_and_gradients
from parallel.ranks import Ranks

from endprompt_megatron.model.shape import read_shape

SEQUENCE = ["parallel.tensor=2", "parallel.sequence=true"]
LAYOUTS = {
    "tp2": ["parallel.tensor=2"],
    "tp2-sequence": SEQUENCE,
    "pp2": ["parallel.pipeline=2"],
    "pp2-virtual": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "dp2-overlap": ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
}
USER_BUFFERS = {
    "bfloat16": [],
    "tensorwise": FP8["tensorwise"],
    "delayed": FP8["delayed"],
    "edges": FP8["tensorwise-edges"],
}


@pytest.fixture
def two():
    pool = Ranks(2, gpu=True)
    yield pool
    pool.close()


def with_user_buffers(recipe, samples) -> dict:
    from endprompt_megatron.distributed import environment, runtime, te
    from endprompt_megatron.distributed.hardware import here

    environment.set_before_cuda(recipe, "test")
    te.set_environment(recipe, "test", here())
    p = recipe.parallel
    runtime.start(p.tensor, p.pipeline, p.virtual_pipeline, p.context, recipe.train.seed)
    te.share_buffers(recipe, read_shape(recipe.model.hf))
    return losses_and_gradients(recipe, samples)


def difference(split: list[dict], whole: dict, recipe) -> tuple[float, float]:
    shape = read_shape(recipe.model.hf)
    joined = {"losses": split[0]["losses"], "parts": join_gradients(split, shape)}
    return compare(joined, {"losses": whole["losses"], "parts": join_gradients([whole], shape)})


@pytest.mark.two_gpus
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_of_two_gpus_equals_one(rank, two, model, layout):
    one, samples = setup(model)
    recipe, _ = setup(model, *LAYOUTS[layout])
    split = two.run(2, losses_and_gradients, recipe, samples)
    loss, gradient = difference(split, rank.run(1, losses_and_gradients, one, samples)[0], recipe)
    assert loss < 5e-3
    assert gradient < 0.1


@pytest.mark.two_gpus
@pytest.mark.with_te
@pytest.mark.fp8
@pytest.mark.parametrize("case", USER_BUFFERS)
def test_overlapped_tensor_parallelism_equals_that_without(two, fresh_two, model, case):
    keys = [*SEQUENCE, *USER_BUFFERS[case]]
    plain, samples = setup(model, *keys)
    recipe, _ = setup(model, *keys, "parallel.overlap_tensor=true")
    found = fresh_two.run(2, with_user_buffers, recipe, samples)
    expected = two.run(2, losses_and_gradients, plain, samples)
    shape = read_shape(recipe.model.hf)
    loss, gradient = compare(
        *({"losses": each[0]["losses"], "parts": join_gradients(each, shape)} for each in (found, expected))
    )
    assert loss < 5e-3
    assert gradient < 0.1


@pytest.fixture
def fresh_two():
    pool = Ranks(2, gpu=True)
    yield pool
    pool.close()


@pytest.mark.two_gpus
@pytest.mark.with_te
@pytest.mark.fp8
@pytest.mark.parametrize("comm", ["p2p", "a2a"])
@pytest.mark.parametrize("case", ["tensorwise", "delayed-attention"])
def test_fp8_under_context_parallelism_stays_with_bfloat16_on_one_gpu(rank, fresh_two, model, case, comm):
    one, samples = setup(model)
    recipe, _ = setup(model, *FP8[case], "parallel.context=2", f"parallel.context_comm={comm}")
    split = fresh_two.run(2, losses_and_gradients, recipe, samples)
    loss, gradient = difference(split, rank.run(1, losses_and_gradients, one, samples)[0], recipe)
    assert loss < 2e-2
    assert gradient < 0.4


def step_in_which_one_raises(recipe, samples) -> None:
    """On a rank: what tools/extend.py does around training when rank 1 runs out of memory in mid-step."""
    from endprompt_megatron.distributed import runtime

    def prepare(models):
        import torch.distributed as dist

        if dist.get_rank() == 1:
            raise MemoryError("out of memory, says the test")

    with runtime.ended_together():
        losses_and_gradients(recipe, samples, prepare)


@pytest.mark.two_gpus
def test_an_error_on_one_rank_ends_both_within_seconds(two, model):
    recipe, samples = setup(model, "parallel.pipeline=2")
    begun = time.monotonic()
    with pytest.raises(AssertionError):
        two.run(2, step_in_which_one_raises, recipe, samples, timeout=300)
    deadline = time.monotonic() + 30
    while any(process.is_alive() for process in two.processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(process.is_alive() for process in two.processes)
    assert time.monotonic() - begun < 120
