"""Files past the page cache have the bytes, places and sums of ordinary files, which they are where all else fails."""

import os
import random
import zlib
from pathlib import Path

import pytest
from small import file_system_of

from endprompt_megatron.common import direct_io
from endprompt_megatron.common.direct_io import ChecksummedFile, OnceFile, crc32

KINDS = ["direct", "opens but does not", "ordinary"]


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    """Small blocks, on a file system with O_DIRECT, with one that takes it back, and without."""
    monkeypatch.setattr(direct_io, "_BLOCK", 3 * 4096)
    monkeypatch.setattr(direct_io, "_SMALL", 512)
    monkeypatch.setattr(OnceFile, "_own", type(OnceFile._own)())
    if request.param == "ordinary":
        monkeypatch.setattr(direct_io, "_DIRECT", 0)
    elif request.param == "opens but does not":
        monkeypatch.setattr(direct_io, "_ALIGNED", 8)  # what is then asked for is refused with EINVAL
    return request.param


def content(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


@pytest.mark.parametrize("count", [0, 1, 4096, 12288, 12289, 100_000])
@pytest.mark.parametrize("step", [1000, 4096, 50_000])
def test_a_written_file_has_the_bytes_and_the_checksum(tmp_path, kind, count, step):
    data = content(count)
    (tmp_path / "file").write_bytes(b"what was there before" * 9999)
    with ChecksummedFile(tmp_path / "file") as file:
        for at in range(0, count, step):
            assert file.write(data[at : at + step]) == len(data[at : at + step])
    assert (tmp_path / "file").read_bytes() == data
    assert (file.count, file.crc32) == (count, zlib.crc32(data))


@pytest.mark.parametrize("cuts", [(5,), (4096, 8192), (1, 12289, 12290, 60_001)])
def test_chunks_of_one_file_do_not_overwrite_each_other_in_any_order(tmp_path, kind, cuts):
    data, path = content(100_000), tmp_path / "file"
    spans = list(zip((0, *cuts), (*cuts, len(data)), strict=True))
    random.Random(len(cuts)).shuffle(spans)
    open_files = [ChecksummedFile(path, begin) for begin, _ in spans]
    for file, (begin, end) in zip(open_files, spans, strict=True):
        file.write(data[begin:end])
    for file in open_files:
        file.close()
    assert path.read_bytes() == data
    for file, (begin, end) in zip(open_files, spans, strict=True):
        assert file.crc32 == zlib.crc32(data[begin:end]) == crc32(path, begin, end - begin)
    assert crc32(path) == zlib.crc32(data)


def test_any_range_of_a_file_is_read_as_it_is(tmp_path, kind):
    data, draw = content(100_000), random.Random(1)
    (tmp_path / "file").write_bytes(data)
    with OnceFile(tmp_path / "file") as file:
        for _ in range(300):
            begin, count = draw.randrange(100_500), draw.choice([1, 30, 5000, 40_000])
            buffer = bytearray(count)
            file.seek(begin)
            found = file.readinto(buffer)
            assert bytes(buffer[:found]) == data[begin : begin + count]
            assert file.tell() == begin + found
        assert file.seek(-10, os.SEEK_END) == 99_990
        assert file.read() == data[-10:]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="reads Linux's /proc")
def test_no_descriptor_of_a_large_file_stays_open(tmp_path, kind):
    before = len(os.listdir("/proc/self/fd"))
    with ChecksummedFile(tmp_path / "file") as file:
        file.write(content(50_000))
    with OnceFile(tmp_path / "file") as once:
        once.readinto(bytearray(50_000))
    for opened in (ChecksummedFile, OnceFile):
        with pytest.raises(FileNotFoundError):
            opened(tmp_path / "nowhere" / "file")
    assert len(os.listdir("/proc/self/fd")) == before


def test_writing_to_a_full_disk_raises_the_systems_own_error(tmp_path: Path, kind):
    with file_system_of(tmp_path / "small", "100k") as place:
        file = ChecksummedFile(place / "file")
        with pytest.raises(OSError, match="No space left") as caught:  # noqa: PT012  (at the write that meets it)
            for _ in range(20):
                file.write(content(20_000))
            file.close()
        assert file.error is caught.value
        file.close()
