"""Large files that are read or written once, past the page cache where the system can (O_DIRECT).

Through the page cache the kernel finds room for every byte and copies it, at more CPU time than the disk takes, and
throws out what is of more use.  File systems that know no O_DIRECT are read and written as usual.
"""

import concurrent.futures
import functools
import io
import mmap
import os
import threading
import zlib
from collections.abc import Iterable
from pathlib import Path

try:
    from isal.isal_zlib import crc32 as add_crc32  # several times as fast as most builds of zlib
    from isal.isal_zlib import crc32_combine
except ImportError:
    add_crc32, crc32_combine = zlib.crc32, None

_ALIGNED = 4096  # what O_DIRECT asks of memory, of places in files and of lengths, on every disk in use
_BLOCK = 8 << 20
_SMALL = 1 << 16  # less than this is read as usual: headers lie beside each other
_DIRECT = getattr(os, "O_DIRECT", 0)


def _block() -> memoryview:
    """_BLOCK bytes of aligned memory."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return memoryview(mmap.mmap(-1, _BLOCK, **private))


def _open(path: Path, flags: int) -> int | None:
    """A descriptor past the page cache; None where the file system has no such thing."""
    if not _DIRECT:
        return None
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError:
        return None


def crc32(path: Path, begin: int = 0, length: int | None = None) -> int:
    """CRC-32 of a file's bytes, or of the `length` bytes from `begin` on."""
    value, block = 0, memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        left = os.stat(path).st_size - begin if length is None else length
        while left > 0 and (count := file.readinto(block[:left])):
            value = add_crc32(block[:count], value)
            left -= count
    return value


def combined_crc32(chunks: Iterable[tuple[int, int]]) -> int:
    """CRC-32 of chunks one after the other, of which (bytes, CRC-32) are known."""
    value, combine = 0, crc32_combine or _zlib_combine
    for count, checksum in chunks:
        value = combine(value, checksum, count)
    return value


def _zlib_combine(first: int, second: int, count: int) -> int:
    """CRC-32 of what has CRC-32 `first`, followed by `count` bytes that have CRC-32 `second` (zlib's crc32_combine)."""
    # A CRC is linear: zero bytes behind the first act on its bits as a matrix, which is squared for each bit of count.
    matrix = [0xEDB88320] + [1 << bit for bit in range(31)]  # one zero bit
    for _ in range(3):
        matrix = [_times(matrix, row) for row in matrix]
    while count:
        if count & 1:
            first = _times(matrix, first)
        matrix, count = [_times(matrix, row) for row in matrix], count >> 1
    return first ^ second


def _times(matrix: list[int], vector: int) -> int:
    return functools.reduce(int.__xor__, (row for bit, row in enumerate(matrix) if vector >> bit & 1), 0)


class ChecksummedFile(io.RawIOBase):
    """A large file, or from `begin` on a chunk of one that exists, being written: `count` bytes and their `crc32`.

    A thread writes one block while the next is filled.  Closed, it is on the disk.  `error` is the operating
    system's last refusal, an OSError.  Memory: two blocks of 8 MiB.
    """

    descriptor: int | None = None

    def __init__(self, path: Path, begin: int | None = None) -> None:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if begin is None else 0)
        self.descriptor = os.open(path, flags, 0o666)  # for what is not aligned
        self.direct = _open(path, os.O_WRONLY)
        self.count, self.crc32, self.error = 0, 0, None
        self.at = begin or 0  # where in the file the filled block goes
        self.blocks = [_block(), _block()]
        self.filled = 0
        # What lies before the first aligned place is a block of its own.
        self.room = -self.at % _ALIGNED or _BLOCK
        self.thread = concurrent.futures.ThreadPoolExecutor(1, "write")
        self.writing: concurrent.futures.Future | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | memoryview) -> int:
        """All of `data`.  Raises OSError, perhaps for what was given earlier."""
        data = memoryview(data).cast("B")
        left = data
        while left:
            taken = min(len(left), self.room - self.filled)
            self.blocks[0][self.filled : self.filled + taken] = left[:taken]
            self.filled += taken
            left = left[taken:]
            if self.filled == self.room:
                self._flush()
        self.count += len(data)
        self.crc32 = add_crc32(data, self.crc32)
        return len(data)

    def _flush(self) -> None:
        """Give the filled block to the thread, once it is done with the one before."""
        self._wait()
        block = self.blocks[0][: self.filled]
        self.writing = self.thread.submit(self._write, block, self.at)
        self.blocks.reverse()
        self.at += self.filled
        self.filled, self.room = 0, _BLOCK

    def _wait(self) -> None:
        if self.writing is not None:
            try:
                self.writing.result()
            except OSError as error:
                self.error = error
                raise
            finally:
                self.writing = None

    def _write(self, block: memoryview, at: int) -> None:
        if self.direct is not None and at % _ALIGNED == 0 and len(block) == _BLOCK:
            try:
                if os.pwrite(self.direct, block, at) == len(block):
                    return
            except OSError:
                os.close(self.direct)  # it was opened, and cannot be used; a full disk says so again below
                self.direct = None
        done = 0
        while done < len(block):
            done += os.pwrite(self.descriptor, block[done:], at + done)

    def close(self) -> None:
        if not self.closed and self.descriptor is not None:
            try:
                if self.error is None:
                    self._flush()
                    self._wait()
                    os.fsync(self.descriptor)
            finally:
                self.thread.shutdown()
                _close(self.descriptor, self.direct)
                super().close()


class OnceFile(io.RawIOBase):
    """A file to read in random places, each byte once."""

    descriptor: int | None = None
    _own = threading.local()  # a block a thread

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.descriptor = os.open(path, os.O_RDONLY)
        self.direct = _open(path, os.O_RDONLY)
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.at}.get(whence)
        self.at = offset + (os.fstat(self.descriptor).st_size if start is None else start)
        return self.at

    def readinto(self, buffer: memoryview) -> int:
        """Fill `buffer` from where the file stands; returns how many bytes that were, fewer at the file's end."""
        target = memoryview(buffer).cast("B")
        done = 0
        while done < len(target):
            count = self._some(target[done:])
            if not count:
                break
            done += count
            self.at += count
        return done

    def _some(self, target: memoryview) -> int:
        if self.direct is not None and len(target) >= _SMALL:
            block = getattr(self._own, "block", None)
            if block is None:
                block = self._own.block = _block()
            skipped = self.at % _ALIGNED
            wanted = min(_BLOCK, -(-(skipped + len(target)) // _ALIGNED) * _ALIGNED)
            try:
                count = os.preadv(self.direct, [block[:wanted]], self.at - skipped) - skipped
                count = max(0, min(count, len(target)))
                target[:count] = block[skipped : skipped + count]
                return count
            except OSError:
                os.close(self.direct)
                self.direct = None
        return os.preadv(self.descriptor, [target], self.at)

    def close(self) -> None:
        if not self.closed and self.descriptor is not None:
            _close(self.descriptor, self.direct)
            super().close()


def _close(*descriptors: int | None) -> None:
    for descriptor in descriptors:
        if descriptor is not None:
            os.close(descriptor)
