"""A corpus becomes Megatron's indexed dataset: PREFIX.bin, PREFIX.idx and a manifest PREFIX.json.

Every chunk of the input (chunks.py) is tokenised into files of its own (tokenise.py) by one process: of a pool, or,
under mpirun, of the rank that owns it (the directory of PREFIX must then be shared by all).  The files are joined in
the order of the input and get their names (finish.py), so the result does not depend on how many workers there were.
All of it happens in `.PREFIX.partial`, which outlives a kill: the same call goes on from there.

Special tokens: BOS before each document where the model family begins texts with it (the tokenizer adds it
when asked for special tokens: LLaMA-2, LLaMA-3, Mistral do, SmolLM2 does not), EOS after each document
where the tokenizer has one, so that a stream of documents shows where one ends.  Both can be turned off.
A conversation has what the chat template writes and nothing else, and a mask of its answers beside its tokens.
"""

import contextlib
import functools
import hashlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import disk_errors, locked_staging
from endprompt_megatron.common.progress import Progress
from endprompt_megatron.common.workers import for_each, mpi, number_of, ranks_agree
from endprompt_megatron.data.corpus.chunks import Chunk, Reading, chunks_of, shares
from endprompt_megatron.data.corpus.encoders import Conversations, Encoder, WholeTexts
from endprompt_megatron.data.corpus.filters import Filters
from endprompt_megatron.data.corpus.finish import (
    CHAT_SUFFIXES,
    SUFFIXES,
    already_joined,
    finish_renaming,
    join,
    publish,
    refuse_taken,
)
from endprompt_megatron.data.corpus.inputs import Source, refuse_texts, sources_of
from endprompt_megatron.data.corpus.manifest import manifests
from endprompt_megatron.data.corpus.tokenise import TRAIN, VALID, Job, Tokenised, tokenise_once
from endprompt_megatron.data.corpus.words import Cut, Words, cut_of
from endprompt_megatron.data.indexed import CHAT, token_dtype
from endprompt_megatron.tokenizer import Tokenizer, load_tokenizer
from endprompt_megatron.tokenizer.chat_template import ChatTemplate, digest_of_template
from endprompt_megatron.tokenizer.fingerprint import fingerprint_of

_CHECKSUM_SPEED = 32  # bytes that a checksum is taken of in the time that one byte is tokenised, about
_BLOCK = 4 << 20
_FAILED = ".failed"


@dataclass(frozen=True)
class Plan:
    """The tasks of a run: `chunks` to tokenise and, numbered after them, `sources` to take the checksum of.

    `joined` says by output and stream how many chunks an earlier start has put into the dataset.  `cut` is None for a
    tokenizer that takes complete texts; every process then loads its own from the directory `tokenizer`.  `template` is
    the chat template of conversations.
    """

    job: Job
    tokenizer: str
    cut: Cut | None
    template: ChatTemplate | None
    sources: list[Source]
    chunks: list[Chunk]
    joined: dict[str, int]

    def sizes(self) -> list[int]:
        """Work of each task, roughly in bytes of text."""
        return [chunk.work for chunk in self.chunks] + [source.bytes // _CHECKSUM_SPEED for source in self.sources]


def prepare(
    inputs: list[str],
    tokenizer: str,
    out: str,
    *,
    manifest: str | None = None,
    workers: int | None = None,
    text_field: str = "text",
    split_blank_lines: int = 0,
    bos: bool = True,
    eos: bool = True,
    filters: Filters | None = None,
    skip_bad: bool = False,
    chat: str | None = None,
    chat_template: str | None = None,
) -> dict | None:
    """Tokenise `inputs` and those in `manifest` into OUT.bin, .idx and .json; returns what is in OUT.json.

    `workers` processes, by default one a CPU; under mpirun or srun every rank is one, all must call, and None comes
    back on those past the first.  `bos` and `eos` put the special tokens of the module docstring.  With
    `filters.held_out` there is OUT-valid too.  `chat`: the inputs hold conversations, in one of chat_formats.FORMATS or
    AUTO; then there are OUT.mask.bin and .idx, and `chat_template` names a file in place of the tokenizer's template.
    Killed or interrupted and called again with the same arguments and inputs, it goes on.  Raises InputError for
    whatever is wrong with the inputs, the tokenizer or the place of the output; then nothing is left behind.
    """
    comm = mpi()
    workers = number_of(workers, comm)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers, who inherit this, are the parallelism
    filters, reading = filters or Filters(), Reading(split_blank_lines, skip_bad, chat)
    outputs = (TRAIN, VALID) if filters.held_out else (TRAIN,)
    suffixes = CHAT_SUFFIXES if chat else SUFFIXES
    with contextlib.ExitStack() as stack:
        plan = finished = loaded = about = None
        with ranks_agree(comm):
            if comm is None or comm.rank == 0:
                refuse_taken(out, outputs, suffixes)
                sources, not_read = sources_of(inputs, manifest, text_field)
                loaded = load_tokenizer(tokenizer)
                template = None
                if eos and not chat and loaded.eos_id is None:
                    print(
                        f"{tokenizer}: neither the tokenizer nor a config.json names EOS, so documents run into each "
                        "other; give eos_token in tokenizer_config.json",
                        file=sys.stderr,
                    )
                if chat:
                    refuse_texts(sources)
                    template = loaded.chat_template(tokenizer, chat_template)
                    bos = eos = False
                about = {
                    "vocab_size": loaded.vocab_size,
                    "tokenizer_sha256": fingerprint_of(loaded),
                    "bos": loaded.bos_id if bos and loaded.starts_with_bos else None,
                    "eos": loaded.eos_id if eos else None,
                    "options": {"text_field": text_field, **asdict(reading), **asdict(filters)},
                }
                if template is not None:
                    about |= {"kind": CHAT, "chat_template_sha256": digest_of_template(template.source)}
                job_key = {"format": 1, "sources": [asdict(source) for source in sources], **about}
                if not_read:
                    about["not_read"] = not_read
                staging = stack.enter_context(locked_staging(Path(out), job_key))
                finished = finish_renaming(staging, out, outputs, suffixes)
                if finished is None:
                    dtype = token_dtype(loaded.vocab_size)
                    job = Job(staging, reading, filters, dtype, about["bos"], about["eos"])
                    plan = _plan(job, tokenizer, loaded, template, sources)
        if comm:
            plan, finished = comm.bcast((plan, finished))
        if finished is None:
            results = _work(plan, comm, workers, loaded, out)
            with ranks_agree(comm):
                if comm is None or comm.rank == 0:
                    finished = _finish(plan, results, about, out)
    return finished if comm is None or comm.rank == 0 else None


def _plan(job: Job, tokenizer: str, loaded: Tokenizer, template: ChatTemplate | None, sources: list[Source]) -> Plan:
    for stray in (*job.staging.glob("*.tmp"), job.staging / _FAILED):
        stray.unlink(missing_ok=True)
    joined = {
        output + stream: len(already_joined(job, output, stream)) for output in job.outputs for stream in job.streams
    }
    cut = None if template else cut_of(loaded)
    return Plan(job, tokenizer, cut, template, sources, chunks_of(sources, job.reading), joined)


def _work(plan: Plan, comm: Any | None, workers: int, loaded: Tokenizer | None, out: str) -> dict[int, Tokenised | str]:
    """Do all tasks; returns results by number, on the first rank those of all ranks.  All ranks call."""
    rank, ranks = (comm.rank, comm.size) if comm else (0, 1)
    sizes = plan.sizes()
    mine = shares(sizes, ranks)[rank]
    own = [sizes[number] for number in mine]
    start = functools.partial(_ready, plan, mine, loaded if min(workers, len(mine)) <= 1 else None)
    with ranks_agree(comm), disk_errors(Path(out), "--out"):
        with Progress("tokenising", sum(own), shown=rank == 0) as progress:
            try:
                done = for_each(start, own, workers, progress.add, fork=True)
            except Exception as error:
                if comm is None or isinstance(error, InputError | OSError):
                    raise
                # Not every exception can be sent to the first rank.
                raise RuntimeError(traceback.format_exc()) from None
    results = dict(zip(mine, done, strict=True))
    if comm:
        results = {number: result for own in comm.gather(results) or [] for number, result in own.items()}
    return results


def _ready(plan: Plan, mine: list[int], tokenizer: Tokenizer | None) -> Callable[[int], Tokenised | str | None]:
    """The function that does a task, made once in every process."""
    encoder: Encoder
    if plan.cut is not None:
        encoder = Words(plan.cut, plan.job.dtype)
    else:
        tokenizer = tokenizer or load_tokenizer(plan.tokenizer)
        if plan.template is not None:
            encoder = Conversations(plan.template, tokenizer.for_chat(), plan.job.dtype)
        else:
            encoder = WholeTexts(tokenizer, plan.job.dtype)
    return functools.partial(_task, plan, mine, encoder)


def _task(plan: Plan, mine: list[int], encoder: Encoder, index: int) -> Tokenised | str | None:
    """What a chunk gave, or a source's SHA-256; None when another process has failed."""
    number, failed = mine[index], plan.job.staging / _FAILED
    if failed.exists():
        return None
    try:
        if number < len(plan.chunks):
            return tokenise_once(plan.job, number, plan.chunks[number], encoder, plan.joined)
        return _sha256_once(plan, number - len(plan.chunks))
    except Exception:
        with contextlib.suppress(OSError):
            failed.touch()
        raise


def _sha256_once(plan: Plan, number: int) -> str:
    """Hexadecimal SHA-256 of a source; an earlier start may have noted it."""
    record = plan.job.staging / f".sum_{number:05d}"
    with contextlib.suppress(OSError):
        if len(noted := record.read_text(encoding="ascii")) == 64:
            return noted
    digest = hashlib.sha256()
    with open(plan.sources[number].path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    record.write_text(digest.hexdigest(), encoding="ascii")
    return digest.hexdigest()


def _finish(plan: Plan, results: dict[int, Tokenised | str], about: dict, out: str) -> dict:
    """Join the chunks' files, write the manifests and give everything its name."""
    job, count = plan.job, len(plan.chunks)
    for source in plan.sources:
        source.refuse_changed()
    tokenised = [results[number] for number in range(count)]
    joined = {output: join(job, tokenised, output) for output in job.outputs}
    checksums = {source.path: results[count + number] for number, source in enumerate(plan.sources)}
    written = manifests(job, plan.chunks, tokenised, joined, about, checksums)
    if not written[TRAIN]["documents"]:
        reasons = {
            **written[TRAIN]["left_out"],
            **{kind: bad["count"] for kind, bad in written[TRAIN]["skipped"].items()},
        }
        listed = ", ".join(f"{number} {reason}" for reason, number in reasons.items() if number)
        raise InputError(
            f"--input {' '.join(source.path for source in plan.sources[:8])}: no tokens in "
            f"{len(plan.sources)} file(s){f' ({listed})' if listed else ''}; there is nothing to train on"
        )
    if VALID in written and not written[VALID]["documents"]:
        raise InputError(
            f"--held-out {job.filters.held_out}: none of {written[TRAIN]['documents']} documents were drawn; give "
            "a larger share, or another --seed"
        )
    publish(job.staging, out, written, CHAT_SUFFIXES if job.reading.chat else SUFFIXES)
    return written[TRAIN]
