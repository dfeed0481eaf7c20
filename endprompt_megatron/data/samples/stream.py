"""Samples cut from the stream of a source's documents (`data.packing: stream`).

windows.py says which tokens a sample takes, builder.py makes the sample.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from endprompt_megatron.data.indexed import Index, path_of
from endprompt_megatron.data.samples.builder import Excerpt, SampleBuilder, check_vocabulary
from endprompt_megatron.data.samples.windows import Windows
from endprompt_megatron.method.positions import pose_content


class EndPromptDataset(torch.utils.data.Dataset):
    """Samples (builder.py) of one indexed dataset; `size` of them, one epoch after the other.

    `vocab_size` is the model's, None to leave ids unchecked.  With `content_skip` the windows are those of
    whole documents (`single`), and a sample takes its two chunks from different places of one.
    """

    def __init__(
        self,
        prefix: Path | str,
        index: Index,
        windows: Windows,
        builder: SampleBuilder,
        size: int,
        vocab_size: int | None = None,
    ) -> None:
        self.prefix, self.windows, self.builder, self.size = str(prefix), windows, builder, size
        self._stream = np.asarray(np.memmap(path_of(prefix, ".bin"), dtype=index.dtype, mode="r"))
        self._vocab_size, self._content_skip = vocab_size, windows.ends == "single"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`: see SampleBuilder.build.  Raises InputError for a token that the model does not know."""
        context = self.context(index)
        check_vocabulary(context, self._vocab_size, f"{self.prefix}.bin")
        return self.builder.build(context, int(index))

    def context(self, index: int) -> np.ndarray:
        """The tokens that sample `index` may take, [a] in the dtype of the file; read only."""
        spans = self.spans(index)
        if len(spans) == 1:
            return self._stream[slice(*spans[0])]
        return np.concatenate([self._stream[start:stop] for start, stop in spans])

    def spans(self, index: int) -> list[tuple[int, int]]:
        """Where the tokens of `context` lie in the .bin: (start, stop) in tokens, one for each place they are from."""
        index = int(index)
        if not 0 <= index < self.size:
            raise IndexError(f"sample {index} of {self.size}")
        spans = self.windows.spans(index)
        if not self._content_skip:
            return spans
        _, start, length = self.windows.document(spans[0][0])
        size = self.windows.size
        first, later = pose_content(size, length, index=index, seed=self.windows.seed)
        return [(start, start + first), (start + later, start + later + size - first)]

    def locate(self, index: int) -> tuple["EndPromptDataset", int]:
        """The source of sample `index`, and the sample's number there: this one."""
        return self, int(index)

    def prepare(self) -> None:
        """Write to the cache what is kept there."""
        self.windows.prepare(self.size)

    def epoch(self, number: int) -> int:
        """Which epoch, from 0, sample `number` belongs to."""
        return number // self.windows.count

    def excerpts(self, number: int) -> list[Excerpt]:
        """What the context of sample `number` consists of, in its order."""
        context_len = self.builder.context_of(number)  # a longer prompt takes the place of tokens of the window
        found, at = [], 0
        for begin, end in self.spans(number):
            count = min(end - begin, context_len - at)
            if count > 0:
                document, start, length = self.windows.document(begin)
                found.append(Excerpt(document, length, begin - start, count, at))
            at += max(count, 0)
        return found

    def recalled(self, number: int) -> list[int]:
        """Where in its context the spans begin that sample `number` recalls: see SampleBuilder.recalled."""
        return self.builder.recalled(number)

    def taken(self, samples: int) -> dict[str, Any]:
        """What the first `samples` samples hold, and what an epoch has: see dataset.consumed."""
        lengths = np.array(self.builder.prompt_lens)
        if len(set(lengths.tolist())) == 1:
            prompt = samples * int(lengths[0])
        else:
            # Numbers of a million samples at a time: no array of all of them.
            blocks = (np.arange(at, min(at + (1 << 20), samples)) for at in range(0, samples, 1 << 20))
            prompt = sum(int(lengths[self.builder.prompt_numbers(block)].sum()) for block in blocks)
        return {
            "context_tokens": samples * self.builder.length - prompt,
            "prompt_tokens": prompt,
            "epochs": samples / self.windows.count,
            "epoch_samples": self.windows.count,
            "epoch_documents": self.windows.documents,
            "left_out_tokens": self.windows.left_out,
        }
