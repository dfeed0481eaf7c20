"""Compressed files as streams: gzip, zstd, xz and bzip2, read without ever holding all of what they hold."""

import bz2
import io
import lzma
import zlib
from typing import Any, BinaryIO

_COMPRESSED_BLOCK = 1 << 12  # bytes at once: the most extreme zstd makes 128 MiB of them
_ZSTD_WINDOW = 1 << 31  # zstd --long=31; its own limit is 128 MiB


class CompressionError(Exception):
    """The file is cut short or damaged; what could be read before was."""


class Decompressed(io.RawIOBase):
    """What a compressed file holds, as a file: a few megabytes at a time, and all of it up to where it breaks.

    `name` is gzip, zstd, xz or bzip2; several frames one after the other are one file.  Raises CompressionError.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._errors = _errors(name)
        self._frame = self._begin()
        self._begun = False  # whether something of the frame was read
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._begun = self._begin(), False
            data = data or self._file.read(_COMPRESSED_BLOCK)
            if not data:
                if self._begun:
                    raise CompressionError("it is cut short")
                return 0
            if not self._begun and self._name in ("gzip", "xz") and not data.strip(b"\0"):
                continue  # both allow zeros after their frames, as tapes have them
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._errors as error:
                raise CompressionError(str(error)) from None
            self._begun = True
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _begin(self) -> Any:
        if self._name == "gzip":
            return zlib.decompressobj(31)
        if self._name == "xz":
            return lzma.LZMADecompressor()
        if self._name == "bzip2":
            return bz2.BZ2Decompressor()
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()


def _errors(name: str) -> tuple[type[Exception], ...]:
    if name == "zstd":
        import zstandard

        return (zstandard.ZstdError,)
    return {"gzip": (zlib.error,), "xz": (lzma.LZMAError,), "bzip2": (OSError, ValueError)}[name]
