"""What a .gz or .zst holds, as a file to read on from: a few megabytes of it at a time, and all of it up to a break."""

import io
import zlib
from typing import BinaryIO

_INPUT = 1 << 12  # bytes at once: the most extreme zstd makes 128 MiB of them


class CompressionError(Exception):
    """The file is cut short or damaged; what could be read before was."""


class Decompressed(io.RawIOBase):
    """`name` is gzip or zstd; several frames one after the other are one file.  Raises CompressionError."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
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
            data = data or self._file.read(_INPUT)
            if not data:
                if self._begun:
                    raise CompressionError("it is cut short")
                return 0
            if not self._begun and self._name == "gzip" and not data.strip(b"\0"):
                continue  # gzip allows zeros after its frames, as tapes have them
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._errors as error:
                raise CompressionError(str(error)) from None
            self._begun = True
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _begin(self):
        if self._name == "gzip":
            self._errors: tuple[type[Exception], ...] = (zlib.error,)
            return zlib.decompressobj(31)
        import zstandard

        self._errors = (zstandard.ZstdError,)
        return zstandard.ZstdDecompressor().decompressobj()
