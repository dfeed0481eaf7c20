"""Samples a second of EndPromptDataset against the same samples built from plain Python lists.

    python benchmarks/dataset_samples.py            # reading
    python benchmarks/dataset_samples.py --index    # building the index of 10 million documents

What the baseline is and how it was measured: benchmarks/dataset_samples.md.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.filterwarnings("ignore")  # megatron.core names every optional package that is absent

PHYSICAL, TARGET, WEIGHT = 8192, 65536, 0.5
VOCABULARY = 128256
GOAL = 20_000  # tokens a second that a rank may train at without waiting for its data
PROMPT = list(range(1000, 1011))  # 11 tokens, as LLaMA-3's tokenizer gives for EP_1


def write_corpus(prefix: Path, tokens: int, mean_length: int) -> None:
    """Random tokens in documents of log-normal length, as an indexed dataset."""
    from endprompt_megatron.data.indexed import token_dtype, write_idx

    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.lognormal(np.log(mean_length) - 0.5, 1.0, size=2 * tokens // mean_length), 1).astype(int)
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), tokens)]
    dtype = token_dtype(VOCABULARY)
    rng.integers(0, VOCABULARY, lengths.sum()).astype(dtype).tofile(f"{prefix}.bin")
    write_idx(Path(f"{prefix}.idx"), lengths, dtype)


def list_pipelines(dataset) -> dict[str, Callable[[int], dict]]:
    """The baselines: windows as lists of ints in memory, mapped by a Python function, made into tensors.

    `python lists` ends with torch.tensor(list), as a collator does; `lists via numpy` takes the quicker way
    over arrays.  Cutting the shuffled stream into windows is done beforehand and not timed.
    """
    import torch

    a, b = PHYSICAL - len(PROMPT), len(PROMPT)
    windows = [dataset.context(index).tolist() for index in range(len(dataset))]

    def preprocess(context: list[int]) -> dict[str, list]:
        tokens = context + PROMPT
        return {
            "tokens": tokens,
            "labels": [*tokens[1:], 0],
            "position_ids": list(range(a)) + list(range(TARGET - b, TARGET)),
            "loss_weights": [1.0] * (a - 1) + [WEIGHT] * b + [0.0],
            "prompt_mask": [False] * (a - 1) + [True] * b + [False],
        }

    dtypes = {"loss_weights": np.float32, "prompt_mask": np.bool_}

    def through_numpy(index: int) -> dict:
        sample = preprocess(windows[index]).items()
        return {key: torch.from_numpy(np.array(value, dtype=dtypes.get(key, np.int64))) for key, value in sample}

    return {
        "python lists": lambda index: {key: torch.tensor(value) for key, value in preprocess(windows[index]).items()},
        "lists via numpy": through_numpy,
    }


def open_dataset(prefix: Path, ends: str):
    """An epoch of samples."""
    from endprompt_megatron.data.indexed import read_idx
    from endprompt_megatron.data.samples.builder import SampleSpec
    from endprompt_megatron.data.samples.dataset import DataSpec, WeightedDataset, build_datasets
    from endprompt_megatron.data.samples.windows import Windows

    count = Windows(read_idx(prefix), PHYSICAL - len(PROMPT), 1, ends=ends).count
    sample = SampleSpec("end_prompt", PHYSICAL, TARGET, [PROMPT], WEIGHT, seed=1)
    data = DataSpec([WeightedDataset(str(prefix))], document_ends=ends)
    return build_datasets(sample, data, count, vocab_size=VOCABULARY)[0]


def build_index(documents: int, mean_length: int) -> None:
    """Time and size of the first epoch's index of so many documents, written to the cache, and of what follows it."""
    from endprompt_megatron.data.indexed import read_idx, write_idx
    from endprompt_megatron.data.samples.blend import turns
    from endprompt_megatron.data.samples.windows import Windows

    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.lognormal(np.log(mean_length) - 0.5, 1.0, size=documents), 1).astype(np.int32)
    with tempfile.TemporaryDirectory() as directory:
        prefix = Path(directory) / "corpus"
        write_idx(Path(f"{prefix}.idx"), lengths, np.dtype(np.int32))
        with open(f"{prefix}.bin", "wb") as file:
            file.truncate(4 * int(lengths.sum(dtype=np.int64)))  # no token is read
        for ends in ("cross", "within"):
            started = time.perf_counter()
            index = read_idx(prefix)
            checked = time.perf_counter()
            windows = Windows(index, PHYSICAL - len(PROMPT), 1, ends=ends, cache=Path(directory))
            windows.prepare(1)
            built = time.perf_counter()
            again = Windows(read_idx(prefix), PHYSICAL - len(PROMPT), 1, ends=ends, cache=Path(directory))
            opened = time.perf_counter()
            again.spans(0)
            first = time.perf_counter() - opened
            size = sum(file.stat().st_size for file in Path(directory).glob("windows-*")) / 2**20
            print(
                f"{documents:,} documents, {ends}: {windows.count:,} windows; checking the .idx "
                f"{checked - started:.2f} s, building and writing {built - checked:.2f} s, first read "
                f"{1000 * first:.1f} ms; cache {size:.0f} MiB"
            )
            for file in Path(directory).glob("windows-*"):
                file.unlink()
    started = time.perf_counter()
    turns([0.5, 0.3, 0.15, 0.05], 10_000_000)
    print(f"turns of 10,000,000 samples among 4 sources: {time.perf_counter() - started:.2f} s")


def seconds(read: Callable[[int], dict], first: int, count: int, size: int) -> float:
    start = time.perf_counter()
    for index in range(first, first + count):
        read(index % size)
    return (time.perf_counter() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8_000_000, help="size of the corpus; default: 8000000")
    parser.add_argument("--mean-length", type=int, default=1000, help="tokens of a document; default: 1000")
    parser.add_argument("--rounds", type=int, default=15, help="of each pipeline, interleaved; default: 15")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--index", action="store_true", help="time the index of 10 million documents instead")
    args = parser.parse_args()
    if args.index:
        build_index(10_000_000, args.mean_length)
        return

    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        prefix = Path(directory) / "corpus"
        write_corpus(prefix, args.tokens, args.mean_length)
        dataset, within = open_dataset(prefix, "cross"), open_dataset(prefix, "within")
        # Rows of several samples (data.packing: documents) take their place here.
        pipelines = {
            "EndPromptDataset": dataset.__getitem__,
            "document_ends: within": lambda index: within[index % len(within)],
            **list_pipelines(dataset),
        }
        size = len(dataset)
        for index in range(0, size, 50):
            ours, _, *others = [read(index) for read in pipelines.values()]
            for theirs in others:
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)

        times: dict[str, list[float]] = {name: [] for name in pipelines}
        for number in range(args.rounds + 1):
            for name, read in pipelines.items():
                count = 40 if "lists" in name else 400
                taken = seconds(read, number * count, count, size)
                if number:  # the first round warms up
                    times[name].append(taken)

    print(f"{size} samples of {PHYSICAL} tokens, documents of {args.mean_length} on average, {args.rounds} rounds")
    ratios = {}
    for name, values in times.items():
        median, low, high = (1e6 * value for value in (statistics.median(values), min(values), max(values)))
        ratio = [slow / fast for slow, fast in zip(values, times["EndPromptDataset"], strict=True)]
        ratios[name] = statistics.median(ratio)
        print(
            f"{name:>21}: {1e6 / median:>7,.0f} samples/s  {median:>7.0f} us ({low:.0f} to {high:.0f})  "
            f"{ratios[name]:>6.1f} x the time of EndPromptDataset ({min(ratio):.1f} to {max(ratio):.1f})"
            f"  {PHYSICAL * 1e6 / median / GOAL:>9,.0f} x {GOAL:,} tokens/s"
        )
    if args.json:
        args.json.write_text(json.dumps({"seconds_a_sample": times, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
