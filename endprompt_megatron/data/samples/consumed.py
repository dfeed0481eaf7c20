"""What a run has read of each of its sources: a pure function of the recipe's data and the samples consumed.

The counts are of the order of the run itself, not of what a process happened to read, so they are exact after
any number of stops, and on any number of ranks.
"""

from typing import Any

import numpy as np

from endprompt_megatron.data.samples.dataset import BlendedDataset, Dataset, Source, sources_in

SEEN_FILE = "data_seen.json"


def seen(dataset: Dataset, consumed_samples: int) -> dict[str, Any]:
    """{"consumed_samples", "sources": [...]} of the first `consumed_samples` samples of a training dataset.

    A source has prefix, samples, share (of the samples), context_tokens, prompt_tokens, epochs (its samples over those
    of an epoch), and what an epoch of it has: epoch_samples, epoch_documents, left_out_tokens (in no sample).  Where
    documents are packed a sample is a row, and packed_documents counts what is in them, pieces of long ones each.
    """
    consumed = min(consumed_samples, len(dataset))
    sources = sources_in(dataset)
    counts = [consumed]
    if isinstance(dataset, BlendedDataset):
        counts = np.bincount(dataset.source[:consumed], minlength=len(sources)).tolist()
    listed = [_source(source, count, consumed) for source, count in zip(sources, counts, strict=True)]
    return {"consumed_samples": consumed, "sources": listed}


def _source(source: Source, samples: int, of: int) -> dict[str, Any]:
    share = samples / of if of else 0.0
    return {"prefix": source.prefix, "samples": samples, "share": share, **source.taken(samples)}
