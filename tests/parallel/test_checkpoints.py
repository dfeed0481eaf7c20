"""What is saved is what is loaded, in every layout, to the last bit; and saving takes no more memory than it says."""

import ctypes
import itertools
import math
import platform
import threading
import time
from functools import partial

import pytest
from parallel.cases import build, exported, make_samples, micro_batches, recipe_for
from small import small_llama

from endprompt_megatron.checkpoint.torch_dist import Checkpoint
from endprompt_megatron.checkpoint.weights import shards_of_range
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron
from endprompt_megatron.model.shape import read_shape

LAYOUTS = {  # ranks and keys
    "one-rank": (1, []),
    "dp2": (2, []),
    "dp4": (4, []),
    "tp2-dp2": (4, ["parallel.tensor=2"]),
    "pp2-dp2": (4, ["parallel.pipeline=2"]),
    "tp2-pp2-sp": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An odd vocabulary, which two tensor ranks pad; and odd sizes, so that ranks' ranges end within rows."""
    directory = tmp_path_factory.mktemp("checkpoints")
    small_llama(directory / "hf", vocab_size=321, intermediate_size=116, tie_word_embeddings=True)
    convert_hf_to_megatron(directory / "hf", directory / "megatron")
    return directory, directory / "hf", directory / "megatron"


def train_and_save(recipe, batches, root, look=None):
    """On a rank: an update a batch, from the newest checkpoint in `root` if there is one, then a checkpoint.

    `look` is called with the model chunks before the first update and after the last.
    """
    from endprompt_megatron.checkpoint.resume import resume
    from endprompt_megatron.checkpoint.run_state import Progress, RunState
    from endprompt_megatron.checkpoint.save import Saver
    from endprompt_megatron.convert.over_base import base_to_record, base_weights
    from endprompt_megatron.training.optimizer import update, zero_grad
    from endprompt_megatron.training.step import run_batch

    _, models, optimizer, scheduler = build(recipe)
    state = RunState(models, optimizer, scheduler, base=base_to_record(recipe))
    base = partial(base_weights, also=recipe.model.init_from)
    progress = resume(root, recipe, "test", state, base) or Progress()
    seen = []
    if look is not None:
        look(models)
    for samples in batches:
        zero_grad(models, optimizer)
        losses = run_batch(models, micro_batches(recipe, samples), backward=True)
        norm, _ = update(optimizer, losses.total, recipe.optim.grad_clip)
        scheduler.step(increment=1)
        progress.step += 1
        seen.append((losses.total, norm))
    if not batches:
        progress.step += 1
    if look is not None:
        look(models)
    with Saver(root, recipe, {"config.json": exported(recipe)}, state) as saver:
        saver.save(progress)
        saver.wait()
    return seen


def everything(directory, vocab):
    """Every tensor of a checkpoint, whole, without the padding of the vocabulary."""
    import torch

    checkpoint = Checkpoint(directory)
    found = {}
    for key, stored in checkpoint.tensors.items():
        shape = tuple(stored.size)
        value = checkpoint.read(key, (0,) * len(shape), shape, stored.properties.dtype)
        found[key] = value[:vocab] if "word_embeddings" in key or "output_layer" in key else value
    found["common"] = torch.load(directory / "common.pt", weights_only=True)
    return found


def assert_same(found, expected):
    import torch

    assert found.keys() == expected.keys()
    assert found.pop("common") == expected.pop("common")
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("written_by", ["dp2", "tp2-dp2", "pp2-dp2"])
def test_saved_state_is_the_same_to_the_last_bit_in_every_other_layout(ranks, model, tmp_path, written_by):
    """Trained and saved in one layout, loaded and saved again in the others, one after the other."""
    world, keys = LAYOUTS[written_by]
    recipe = recipe_for(*model, *keys)
    vocab = read_shape(recipe.model.hf).vocab_size
    batches = [make_samples(recipe, vocab, 8, seed=step) for step in range(3)]
    ranks.run(world, train_and_save, recipe, batches, tmp_path)
    expected = everything(tmp_path / "iter_0000003", vocab)
    assert expected["common"]["optimizer"]["updates"] == 3
    moments = [key for key in expected if key.startswith("optimizer.state.exp_avg_sq.")]
    assert moments
    assert all(bool(expected[key].any()) for key in moments)
    for step, (world, keys) in enumerate(LAYOUTS.values(), start=4):
        ranks.run(world, train_and_save, recipe_for(*model, *keys), [], tmp_path)
        assert_same(everything(tmp_path / f"iter_{step:07d}", vocab), dict(expected))


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_training_resumes_to_the_last_bit_with_two_data_parallel_ranks(ranks, model, tmp_path, bf16):
    recipe = recipe_for(*model, *(["precision.dtype=bfloat16"] if bf16 else []), "checkpoint.async=true")
    vocab = read_shape(recipe.model.hf).vocab_size
    batches = [make_samples(recipe, vocab, 8, seed=step) for step in range(5)]
    whole = ranks.run(2, train_and_save, recipe, batches, tmp_path / "whole")
    first = ranks.run(2, train_and_save, recipe, batches[:2], tmp_path / "parts")
    second = ranks.run(2, train_and_save, recipe, batches[2:], tmp_path / "parts")
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    assert_same(*(everything(tmp_path / name / "iter_0000005", vocab) for name in ("parts", "whole")))


def test_every_data_parallel_rank_writes_its_share_of_a_checkpoint(ranks, model, tmp_path):
    recipe = recipe_for(*model)
    ranks.run(4, train_and_save, recipe, [make_samples(recipe, 321, 8)], tmp_path)
    sizes = [(tmp_path / "iter_0000001" / f"__{rank}_0.distcp").stat().st_size for rank in range(4)]
    assert max(sizes) < 1.5 * min(sizes), sizes


def load_with_megatron(recipe, directory):
    """On a rank: the model's weights by Megatron-Core's own loader, against those in our loader's hands."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    from endprompt_megatron.checkpoint.weights import read_weights, weights_of

    _, models, _, _ = build(recipe)
    (chunk,) = unwrap_model(models)
    theirs = dist_checkpointing.load(chunk.sharded_state_dict(), str(directory))
    read_weights(weights_of(models), Checkpoint(directory))
    ours = chunk.state_dict()
    tensors = {key: value for key, value in theirs.items() if isinstance(value, torch.Tensor)}
    assert len(tensors) > 10
    return all(torch.equal(ours[key], value) for key, value in tensors.items())


def test_megatron_core_loads_a_saved_checkpoint(ranks, model, tmp_path):
    recipe = recipe_for(*model)
    ranks.run(2, train_and_save, recipe, [make_samples(recipe, 321, 8)], tmp_path)
    moved = recipe_for(*model, "parallel.tensor=2")
    assert all(ranks.run(2, load_with_megatron, moved, tmp_path / "iter_0000001"))


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 4, 3), (2, 3, 4), (1, 1, 6)])
def test_a_range_of_a_flattened_tensor_is_a_few_shards_in_order(shape):
    import torch

    count = math.prod(shape)
    whole = torch.arange(count).view(shape)
    for start, end in itertools.combinations_with_replacement(range(count + 1), 2):
        found, number = [], 0
        for offset, size in shards_of_range(shape, start, end):
            part = whole
            for axis, (begin, length) in enumerate(zip(offset, size, strict=True)):
                part = part.narrow(axis, begin, length)
            found += part.flatten().tolist()
            number += 1
        assert found == list(range(start, end))
        assert number <= 2 * len(shape) - 1


class Heap(ctypes.Structure):
    """glibc's mallinfo2: what malloc has handed out, torch's tensors and numpy's arrays among it."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def allocated() -> int:
    """Bytes that this process's code has allocated and not freed.

    Not its resident memory, which has in it what malloc keeps, libraries and files, and what the kernel leaves.
    """
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Heap
    heap = mallinfo2()
    return heap.uordblks + heap.hblkhd


def memory_of_a_save(recipe, root):
    """On a rank: bytes of its state, and how much more was allocated at most while a first save ran.

    The peak is of a thread that looks every millisecond.
    """
    import torch

    from endprompt_megatron.checkpoint.optimizer_state import stored_state
    from endprompt_megatron.checkpoint.run_state import Progress, RunState
    from endprompt_megatron.checkpoint.save import Saver
    from endprompt_megatron.checkpoint.weights import stored_weights, weights_of

    before = allocated()
    held = torch.empty(1 << 25)
    assert allocated() - before == pytest.approx(held.nbytes, rel=0.01), "torch takes its memory from elsewhere"
    del held
    _, models, optimizer, scheduler = build(recipe)
    state = RunState(models, optimizer, scheduler)
    weights = weights_of(models)
    own = sum(part.load().nbytes for part in (*stored_weights(weights), *stored_state(optimizer, weights)))
    peak, ended = [0], threading.Event()

    def look():
        while not ended.is_set():
            peak[0] = max(peak[0], allocated())
            time.sleep(0.001)

    looking = threading.Thread(target=look)
    before = allocated()
    looking.start()
    with Saver(root, recipe, {"config.json": exported(recipe)}, state) as saver:
        saver.save(Progress(1, 0))
        saver.wait()
    ended.set()
    looking.join()
    return own, peak[0] - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc's malloc")
def test_memory_of_a_save_is_one_tensor_and_beside_the_training_one_copy_of_the_state(ranks, tmp_path):
    small_llama(tmp_path / "hf", hidden_size=512, intermediate_size=1024, vocab_size=16000, tokenizer=False)
    convert_hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    place = tmp_path, tmp_path / "hf", tmp_path / "megatron"
    largest = 16000 * 512 * 4
    for asynchronous, copies in (("false", 0), ("true", 1)):
        recipe = recipe_for(*place, f"checkpoint.async={asynchronous}")
        for own, grown in ranks.run(2, memory_of_a_save, recipe, tmp_path / asynchronous):
            print(f"async={asynchronous}: {grown / 2**20:.1f} MiB for {own / 2**20:.1f} MiB of state")
            assert own > 5 * largest
            assert copies * own <= grown < copies * own + largest + (4 << 20)


def scales_of_attention(recipe, fp8: bool) -> dict:
    """On a rank: what a core attention of Transformer Engine's would store, by its key."""
    from types import SimpleNamespace

    import torch
    from megatron.core import parallel_state

    from endprompt_megatron.model.packed_sequences import packed_attention

    build(recipe)

    class Attention(torch.nn.Module):
        """As Megatron wraps Transformer Engine's: there is a state, and it is left out."""

        config = SimpleNamespace(fp8_dot_product_attention=fp8)

        def get_extra_state(self):
            return "scales"

        def sharded_state_dict(self, *_):
            return {}

    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    stored = packed_attention(Attention)().sharded_state_dict("layers.core_attention.", ((0, 3, 8),), metadata)
    return {name: (entry.unique_key, entry.data, entry.replica_id) for name, entry in stored.items()}


@pytest.mark.parametrize("fp8", [True, False])
def test_scales_of_attention_in_fp8_are_stored_with_their_layer_by_one_rank(ranks, model, fp8):
    found = ranks.run(2, scales_of_attention, recipe_for(*model, "parallel.tensor=2"), fp8)
    if not fp8:
        assert found == [{}, {}]
        return
    for rank, stored in enumerate(found):
        ((key, data, replica),) = stored.values()
        assert (key, data) == ("layers.core_attention._extra_state/shard_3_8", "scales")
        assert any(replica) == (rank > 0)
