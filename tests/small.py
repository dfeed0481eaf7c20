"""Small real things that tests share: Hugging Face LLaMA models, a tokenizer, a text, a command line."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 900  # seconds for what takes a few: who waits so long waits for ever, however busy the machine is

WORDS = (
    "the of and a to in is was he for it with as his on be at by had not are but from or have an they which one "
    "you were her all she there would their we him been has when who will more no if out so said what up its about"
).split()


def text(count: int, seed: int = 0) -> str:
    """`count` words of English-looking text, the same for the same seed."""
    import random

    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(count))


def small_tokenizer(directory: Path, vocab_size: int = 256, texts: list[str] | None = None) -> Path:
    """Train and save a real byte-level BPE tokenizer of at most `vocab_size` pieces (at least 260 to be lossless)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet if vocab_size >= 260 else []
    )
    texts = texts or [text(2000), "This is the end of text, please pay attention here End."]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=specials[0], eos_token=specials[1])
    fast.save_pretrained(directory)
    return directory


def small_sentencepiece(
    directory: Path, sentences: list[str] = (), vocab_size: int = 70, *, llama_2: bool = False
) -> Path:
    """Train and save a real SentencePiece model, tokenizer.model, on English-looking text and `sentences`.

    `llama_2`: by its rules (BPE, bytes for what it does not know, blanks as they are).
    """
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text(40, seed) for seed in range(40)] + list(sentences)),
        model_writer=model,
        vocab_size=vocab_size,
        minloglevel=3,
        **(_LLAMA_2 if llama_2 else {"byte_fallback": False}),
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


def small_llama(directory: Path, *, seed: int = 0, dtype: str = "float32", tokenizer: bool = True, **overrides) -> Path:
    """Save a random LLaMA of 4 layers (GQA 4/2, vocabulary 320, window 64) with safetensors weights and tokenizer.

    `overrides` are LlamaConfig fields; `model_type="mistral"` makes a Mistral, "qwen2" a Qwen2.5, "qwen3" a Qwen3.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        initializer_range=0.08,
        bos_token_id=0,
        eos_token_id=1,
    )
    fields.update(overrides)
    config = AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # ones and zeros would hide what is loaded into the wrong place
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    if tokenizer:
        small_tokenizer(directory, vocab_size=min(300, fields["vocab_size"]))
    return directory


_LLAMA_2 = {
    **{"model_type": "bpe", "byte_fallback": True, "split_digits": True},
    **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
}


def scaled_config(
    config: dict, rope_type: str, factor: float, original: int, target: int, theta: float | None = None, **knobs: object
) -> dict:
    """The config (parsed config.json) that a recipe with this context.rope exports a model with."""
    from endprompt_megatron.method.rope_parameters import Scaling, read_rope, scaled, written
    from endprompt_megatron.model.families import FAMILIES

    whole = FAMILIES[config["model_type"]].complete(config)
    head_dim = whole["head_dim"] or whole["hidden_size"] // whole["num_attention_heads"]
    own = read_rope(whole, head_dim, "config.json")
    return written(config, scaled(own, Scaling(rope_type, factor, original, target, theta, knobs), "recipe.yaml"))


def run_tool(
    name: str, *args: object, timeout: float = PATIENCE, env: dict | None = None
) -> subprocess.CompletedProcess:
    """Run tools/NAME.py with `args` as a user would; returns exit code, stdout and stderr as text.

    In a fork of a process that has imported what tools import, unless a variable of the environment could matter.
    """
    script, arguments = str(ROOT / "tools" / f"{name}.py"), [*map(str, args)]
    if env or _environment() != _ToolServer.environment():
        command = [sys.executable, script, *arguments]
        environment = {**os.environ, **(env or {})}
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT)
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        job = {"script": script, "arguments": arguments, "directory": str(ROOT), "out": str(out), "err": str(err)}
        code = _ToolServer.running().run(job, timeout)
        return subprocess.CompletedProcess([script, *arguments], code, out.read_text(), err.read_text())


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


class _ToolServer:
    """tool_server.py, started once for each process that runs tests."""

    _one: "_ToolServer | None" = None
    _started_with: dict[str, str] | None = None

    @classmethod
    def environment(cls) -> dict[str, str]:
        """What it was started with, or would be."""
        return _environment() if cls._started_with is None else cls._started_with

    @classmethod
    def running(cls) -> "_ToolServer":
        if cls._one is None:
            cls._started_with, cls._one = _environment(), cls()
        return cls._one

    def __init__(self) -> None:
        theirs, jobs = os.pipe()
        answers, ours = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "tool_server.py"), str(theirs), str(ours)],
            pass_fds=[theirs, ours],
            stdin=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(ours)
        self.jobs, self.answers = open(jobs, "w"), open(answers)  # noqa: SIM115  (its end is ours)
        self.lock = threading.Lock()

    def run(self, job: dict, timeout: float) -> int:
        """The exit code, as subprocess gives it.  Raises TimeoutExpired after killing the process."""
        with self.lock:
            print(json.dumps(job), file=self.jobs, flush=True)
            child = int(self.answers.readline())
            late = threading.Timer(timeout, os.kill, (child, signal.SIGKILL))
            late.start()
            code = int(self.answers.readline())
            if not late.is_alive():
                raise subprocess.TimeoutExpired(job["script"], timeout)
            late.cancel()
            return code


@contextlib.contextmanager
def file_system_of(mount: Path, size: str) -> Iterator[Path]:
    """A real file system of that size ("100k") at `mount`; the test is skipped where mounting is refused."""
    import pytest

    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mounting a small file system is refused: {done.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def assert_one_line_error(result: subprocess.CompletedProcess, *needles: str) -> None:
    """The contract for bad input: exit code 2, one line on stderr, no traceback, and every needle in it."""
    assert result.returncode == 2, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, f"expected one line on stderr, got {len(lines)}:\n{result.stderr}"
    assert lines[0].startswith("error: "), lines[0]
    for needle in needles:
        assert needle in lines[0], f"{needle!r} is not in: {lines[0]}"


def edit_json(path: Path, **changes: object) -> None:
    """Change fields of a JSON file in place; None removes a field."""
    value = json.loads(path.read_text())
    for key, change in changes.items():
        if change is None:
            value.pop(key, None)
        else:
            value[key] = change
    path.write_text(json.dumps(value))


def mpirun(ranks: int) -> list[str] | None:
    """The command that starts MPI ranks of Python here, None where there is no MPI that works."""
    launcher = Path(sys.executable).parent / "mpirun"
    launcher = str(launcher) if launcher.exists() else shutil.which("mpirun")
    if launcher is None:
        return None
    flags = []
    version = subprocess.run([launcher, "--version"], capture_output=True, text=True).stdout
    if "Open MPI" in version or "OpenRTE" in version:
        # Waiting ranks would spin, and take the core from the one that works.
        flags = ["--oversubscribe", "--mca", "mpi_yield_when_idle", "1"] + (
            ["--allow-run-as-root"] if os.geteuid() == 0 else []
        )
    command = [launcher, *flags, "-n", str(ranks), sys.executable]
    probe = [*command, "-c", f"from mpi4py import MPI; assert MPI.COMM_WORLD.size == {ranks}"]
    return command if subprocess.run(probe, capture_output=True).returncode == 0 else None
