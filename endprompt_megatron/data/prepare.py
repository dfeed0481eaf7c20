"""A corpus becomes Megatron's indexed dataset: PREFIX.bin, PREFIX.idx and a manifest PREFIX.json.

Every piece of the input (sources.py) is tokenised into a part file by one process: of a pool, or, under
mpirun, of the rank that owns it (the directory of PREFIX must then be shared by all).  The parts are joined
in the order of the input, so the result does not depend on how many workers there were.

Special tokens: BOS before each document where the model family begins texts with it (the tokenizer adds it
when asked for special tokens: LLaMA-2, LLaMA-3, Mistral do, SmolLM2 does not), EOS after each document
where the tokenizer has one, so that a stream of documents shows where one ends.  Both can be turned off.
"""

import contextlib
import functools
import os
import shutil
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from endprompt_megatron.data.indexed import path_of, token_dtype, write_idx
from endprompt_megatron.data.progress import Progress
from endprompt_megatron.data.sources import Piece, Reading, documents, pieces_of, place
from endprompt_megatron.errors import EXIT_INPUT, InputError
from endprompt_megatron.files import disk_errors, refuse_existing, write_json
from endprompt_megatron.tokenizer import Tokenizer, fingerprint, load_tokenizer
from endprompt_megatron.workers import for_each, mpi, number_of

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Job:
    """What every worker needs to know; `bos` and `eos` are ids, None for none."""

    tokenizer: str
    staging: Path
    reading: Reading
    dtype: np.dtype
    bos: int | None
    eos: int | None


@dataclass(frozen=True)
class Part:
    """What a piece gave: its documents and tokens, the texts without a token (left out), the highest id."""

    documents: int
    tokens: int
    empty: int
    max_id: int


def prepare(
    inputs: list[str],
    tokenizer: str,
    out: str,
    *,
    workers: int | None = None,
    text_field: str = "text",
    split_blank_lines: int = 0,
    bos: bool = True,
    eos: bool = True,
) -> dict | None:
    """Tokenise `inputs` into OUT.bin, OUT.idx and OUT.json; returns the manifest (None on ranks past 0).

    `workers` processes, by default one a CPU; under mpirun every rank is one worker.  `bos` and `eos` put
    the special tokens of the module docstring.  Raises InputError for everything that the inputs, the
    tokenizer or the place of the output can be wrong with; then nothing is left behind.
    """
    comm = mpi()
    workers = number_of(workers, comm)
    if comm is not None:
        return _prepare_by_ranks(comm, inputs, tokenizer, out, Reading(text_field, split_blank_lines), bos, eos)
    with _plan(inputs, tokenizer, out, Reading(text_field, split_blank_lines), bos, eos) as (job, pieces, loaded):
        with Progress("tokenising", sum(piece.work for piece in pieces)) as progress:
            own = loaded if min(workers, len(pieces)) <= 1 else None
            start = functools.partial(_tokenising, job, pieces, own)
            parts = dict(enumerate(for_each(start, [piece.work for piece in pieces], workers, progress.add)))
        return _join(job, inputs, pieces, parts, loaded, out)


@contextlib.contextmanager
def _plan(inputs: list[str], tokenizer: str, out: str, reading: Reading, bos: bool, eos: bool):
    """Check everything that can be checked at once; yield (Job, pieces, tokenizer) with a place for the parts."""
    for suffix in (".bin", ".idx", ".json"):
        refuse_existing(path_of(out, suffix), "--out")
    if Path(out).is_dir() or str(out).endswith("/"):
        raise InputError(f"--out {out}: is a directory; give a prefix such as {Path(out) / 'corpus'}")
    pieces = pieces_of(inputs, reading)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers, who inherit this, are the parallelism
    loaded = load_tokenizer(tokenizer)
    staging = Path(out).with_name(f".{Path(out).name}.partial-{os.getpid()}")
    job = Job(
        tokenizer=str(tokenizer),
        staging=staging,
        reading=reading,
        dtype=token_dtype(loaded.vocab_size),
        bos=loaded.bos_id if bos and loaded.starts_with_bos else None,
        eos=loaded.eos_id if eos else None,
    )
    try:
        with disk_errors(Path(out), "--out"):
            staging.mkdir(parents=True)
            yield job, pieces, loaded
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def tokenise_piece(job: Job, number: int, piece: Piece, tokenizer: Tokenizer) -> Part:
    """Tokenise one piece into its part files (tokens, and lengths of documents) in the staging directory."""
    lengths: list[int] = []
    empty = tokens = max_id = 0
    with open(job.staging / f"{number}.bin", "wb") as file:
        for batch in _batches(documents(piece, job.reading)):
            for ids in _encode(piece, batch, tokenizer):
                if not ids:
                    empty += 1
                    continue
                ids = ([] if job.bos is None else [job.bos]) + ids + ([] if job.eos is None else [job.eos])
                array = np.array(ids, dtype=job.dtype)
                file.write(array.tobytes())
                lengths.append(len(array))
                tokens += len(array)
                max_id = max(max_id, int(array.max()))
    np.save(job.staging / f"{number}.npy", np.array(lengths, dtype=np.int32))
    return Part(len(lengths), tokens, empty, max_id)


def _batches(numbered: Iterable[tuple[int, str]]) -> Iterable[list[tuple[int, str]]]:
    batch, characters = [], 0
    for item in numbered:
        batch.append(item)
        characters += len(item[1])
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(piece: Piece, batch: list[tuple[int, str]], tokenizer: Tokenizer) -> list[list[int]]:
    try:
        return tokenizer.encode_batch([text for _, text in batch])
    except UnicodeEncodeError as error:  # "\ud800" in JSON is half a character
        number = next(number for number, text in batch if text == error.object)
        raise InputError(f"{place(piece, number)}: lone surrogate at character {error.start}; not valid text") from None


def _tokenising(job: Job, pieces: list[Piece], tokenizer: Tokenizer | None = None):
    """What tokenises the piece of a number: made once in every process, with a tokenizer of its own."""
    tokenizer = tokenizer or load_tokenizer(job.tokenizer)
    return lambda number: tokenise_piece(job, number, pieces[number], tokenizer)


# Several machines: the ranks of mpirun


def _prepare_by_ranks(
    comm, inputs: list[str], tokenizer: str, out: str, reading: Reading, bos: bool, eos: bool
) -> dict | None:
    """Rank 0 plans and joins, every rank tokenises its share.

    An error on any rank stops all of them and is raised on rank 0 alone; the others leave quietly.
    """
    manifest = plan = failure = loaded = None
    with contextlib.ExitStack() as stack:
        if comm.rank == 0:
            try:
                job, pieces, loaded = stack.enter_context(_plan(inputs, tokenizer, out, reading, bos, eos))
                plan = (job, pieces)
            except Exception as error:
                failure = error
        plan = comm.bcast(plan, root=0)
        if plan is not None:
            job, pieces = plan
            parts, failure = _tokenise_share(comm, job, pieces, out, loaded)
            gathered = comm.gather((parts, failure), root=0)
            if comm.rank == 0:
                failure = next((error for _, error in gathered if error is not None), None)
                if failure is None:
                    try:
                        merged = {number: part for parts, _ in gathered for number, part in parts.items()}
                        manifest = _join(job, inputs, pieces, merged, loaded, out)
                    except Exception as error:
                        failure = error
    succeeded = comm.bcast(failure is None, root=0)
    if comm.rank == 0 and failure is not None:
        raise failure
    if not succeeded:
        sys.exit(EXIT_INPUT)
    return manifest


def _tokenise_share(
    comm, job: Job, pieces: list[Piece], out: str, loaded: Tokenizer | None
) -> tuple[dict[int, Part], Exception | None]:
    """Tokenise this rank's pieces; an error comes back as a value, for the ranks must meet again."""
    parts: dict[int, Part] = {}
    failed = job.staging / "failed"
    mine = shares(pieces, comm.size)[comm.rank]
    try:
        total = sum(pieces[number].work for number in mine)
        with disk_errors(Path(out), "--out"), Progress("tokenising", total, shown=comm.rank == 0) as progress:
            loaded = loaded or load_tokenizer(job.tokenizer)
            for number in mine:
                if failed.exists():  # another rank met an error: no use going on
                    break
                parts[number] = tokenise_piece(job, number, pieces[number], loaded)
                progress.add(pieces[number].work)
    except Exception as error:
        with contextlib.suppress(OSError):
            failed.touch()
        # Anything unexpected keeps its traceback as text: not every exception survives the way to rank 0.
        return parts, error if isinstance(error, InputError) else RuntimeError(traceback.format_exc())
    return parts, None


def shares(pieces: list[Piece], ranks: int) -> list[list[int]]:
    """Numbers of the pieces of each rank, balanced by their work: the largest first, to whom has least."""
    owned: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for number in sorted(range(len(pieces)), key=lambda number: -pieces[number].work):
        rank = load.index(min(load))
        owned[rank].append(number)
        load[rank] += pieces[number].work
    return owned


# The parts become the dataset


def _join(
    job: Job, inputs: list[str], pieces: list[Piece], parts: dict[int, Part], tokenizer: Tokenizer, out: str
) -> dict:
    """Join the parts in the order of the pieces, write index and manifest, and let all three appear."""
    tokens = sum(part.tokens for part in parts.values())
    if tokens == 0:
        raise InputError(
            f"--input {' '.join(inputs)}: not a single token in {len(inputs)} file(s); nothing to train on"
        )
    bin_, idx, manifest_path = (job.staging / f"joined{suffix}" for suffix in (".bin", ".idx", ".json"))
    lengths = []
    with open(bin_, "wb") as joined:
        for number in range(len(pieces)):
            part = job.staging / f"{number}.bin"
            with open(part, "rb") as file:
                shutil.copyfileobj(file, joined, 1 << 20)
            part.unlink()  # so that the disk never holds the corpus twice
            lengths.append(np.load(job.staging / f"{number}.npy"))
        joined.flush()
        os.fsync(joined.fileno())
    write_idx(idx, np.concatenate(lengths), job.dtype)
    manifest = {
        "format": 1,
        "documents": sum(part.documents for part in parts.values()),
        "tokens": tokens,
        "empty_documents": sum(part.empty for part in parts.values()),
        "dtype": job.dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "max_token_id": max(part.max_id for part in parts.values()),
        "bos": job.bos,
        "eos": job.eos,
        "tokenizer_sha256": fingerprint(job.tokenizer),
        "sources": [_source(path, pieces, parts) for path in dict.fromkeys(inputs)],
    }
    write_json(manifest_path, manifest)
    # The index comes last: a dataset without it is refused as incomplete.
    for file, suffix in ((bin_, ".bin"), (manifest_path, ".json"), (idx, ".idx")):
        file.rename(path_of(out, suffix))
    return manifest


def _source(path: str, pieces: list[Piece], parts: dict[int, Part]) -> dict:
    mine = [parts[number] for number, piece in enumerate(pieces) if piece.path == path]
    return {
        "path": path,
        "bytes": Path(path).stat().st_size,
        "documents": sum(part.documents for part in mine),
        "tokens": sum(part.tokens for part in mine),
    }
