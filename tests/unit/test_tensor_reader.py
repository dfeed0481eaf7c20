"""Parts of stored tensors are what torch.load and slicing give, and cost no more memory than they hold."""

import io
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import ROOT

from endprompt_megatron.checkpoint import shard_files, tensor_reader, torch_dist


def archive(tensor: torch.Tensor, before: bytes = b"other tensors") -> tuple[io.BytesIO, int, int]:
    """What a checkpoint's file holds: something else, then the tensor as torch.save writes it, then more."""
    file = io.BytesIO()
    file.write(before)
    begin = file.tell()
    stored = io.BytesIO()
    torch.save(tensor, stored)
    file.write(stored.getvalue() + b"the next one")
    return file, begin, len(stored.getvalue())


@st.composite
def shards(draw):
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    box = [sorted(draw(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)))) for size in shape]
    return shape, [(low, high + 1) for low, high in box]


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int64)


@settings(max_examples=200, deadline=None)
@given(shards(), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(0, 5), st.sampled_from([1, 40, 1 << 20]))
def test_any_slice_of_a_stored_tensor_of_any_dtype_is_read(case, stored, wanted, odd, block):
    shape, box = case
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(9).to(stored)
    file, begin, length = archive(tensor, b"x" * odd)
    target = torch.empty([high - low for low, high in box], dtype=wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_reader, "_BLOCK", block)
        record = tensor_reader.find(file, begin, length)
        assert record.shape == tuple(shape)
        tensor_reader.read_into(target, file, record, tuple(low for low, _ in box))
    expected = tensor[tuple(slice(low, high) for low, high in box)].to(wanted)
    assert torch.equal(target, expected)


def test_a_scalar_and_a_view_of_a_larger_storage_are_read():
    number = torch.tensor(3.5)
    file, begin, length = archive(number)
    target = torch.zeros(())
    tensor_reader.read_into(target, file, tensor_reader.find(file, begin, length), ())
    assert target == 3.5

    view = torch.arange(24.0)[12:].reshape(3, 4)  # torch.save keeps the whole storage and where the view begins
    file, begin, length = archive(view)
    target = torch.empty(2, 4)
    tensor_reader.read_into(target, file, tensor_reader.find(file, begin, length), (1, 0))
    assert torch.equal(target, view[1:])


@pytest.mark.parametrize(
    "tensor",
    [torch.arange(12.0).reshape(3, 4).t(), torch.nn.Parameter(torch.ones(3)), [torch.ones(3)], torch.ones(3) > 0],
    ids=["turned", "parameter", "list", "bool"],
)
def test_a_tensor_stored_in_another_way_is_left_to_torch(tensor):
    assert tensor_reader.find(*archive(tensor)) is None


def test_a_stored_transposed_tensor_is_read(tmp_path):
    """Megatron-Core may store what is not contiguous; ours never does."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    value = torch.arange(12.0).reshape(3, 4).t()
    save({"x": value}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    torch_dist.write_json(tmp_path / "metadata.json", torch_dist.FORMAT)
    found = torch_dist.Checkpoint(tmp_path).read("x", (1, 1), (2, 2), torch.float32)
    assert torch.equal(found, value[1:3, 1:3])


def test_a_damaged_tensor_is_an_error_and_not_wrong_numbers():
    file, begin, length = archive(torch.ones(100))
    short = io.BytesIO(file.getvalue()[: begin + length - 300])
    with pytest.raises((ValueError, zipfile.BadZipFile)):
        tensor_reader.find(short, begin, length)
    record = tensor_reader.find(file, begin, length)
    with pytest.raises(ValueError, match="ends before"):
        tensor_reader.read_into(torch.empty(100), io.BytesIO(file.getvalue()[: record.begin + 40]), record, (0,))


MEMORY = """
import sys
sys.path.insert(0, {root!r})
import torch
from pathlib import Path
from endprompt_megatron.checkpoint import torch_dist
anonymous = lambda: int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) >> 10
checkpoint, before, highest = torch_dist.Checkpoint(Path({place!r})), anonymous(), 0
for begin, end in zip(cuts := checkpoint.row_cuts("x", (0, 0), (1 << 15, 1 << 13), 0), cuts[1:]):
    part = checkpoint.read("x", (begin, 0), (end - begin, 1 << 13), torch.bfloat16)
    assert (part == 1).all()
    highest = max(highest, anonymous())
print(highest - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_a_stored_shard_of_half_a_gigabyte_is_never_held(tmp_path):
    """As a rank without tensor parallelism stores an embedding, all in one."""
    shape = (1 << 15, 1 << 13)
    dtype = torch.bfloat16
    stored = shard_files.Shard("x", shape, (0, 0), shape, dtype, lambda: torch.ones(shape, dtype=dtype))
    torch_dist.describe(tmp_path, [shard_files.write_file(tmp_path, "__0_0.distcp", [stored], {})], {})
    script = MEMORY.format(root=str(ROOT), place=str(tmp_path))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The part in hand (64 MiB), the one before, the comparison; the whole would be 512.
    assert int(done.stdout) < 256
