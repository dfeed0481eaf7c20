"""What is to be measured, as the command line says it, and the rules that need no file."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from endprompt_megatron.common.errors import InputError

SUITES = ("perplexity", "needle", "recall", "virtual", "ruler", "longbench", "short")
EXTENDED, BASELINE = "extended", "baseline"
DEPTHS = (0.1, 0.5, 0.9)


@dataclass
class Settings:
    """What to measure.  Lengths in tokens; None is what its comment says."""

    suites: list[str]
    lengths: list[int]
    text: str | None = None
    windows: int = 2
    scored: int = 512
    stride: int | None = None  # None: no sliding window
    depths: list[float] = field(default_factory=lambda: list(DEPTHS))
    samples: int = 1
    filler: str = "noise"
    needle_lengths: list[int] | None = None  # None: `lengths`
    recall_distances: list[int] | None = None  # None: recall.default_distances of each length
    recall_form: str | None = None
    physical: int = 512
    distances: list[int] | None = None  # None: virtual.default_distances up to the extended model's window
    probe_samples: int = 8
    template: str = "base"  # or "chat": the model's own chat template
    ruler_template: str | None = None  # one of RULER's by name; None: `template`
    ruler_tasks: list[str] | None = None  # None: all of them
    ruler_samples: int = 500
    haystack: str | None = None
    squad: str | None = None
    hotpotqa: str | None = None
    english_words: str | None = None
    punkt: str | None = None
    ruler_seed: int = 42
    longbench_data: str | None = None
    longbench_e: bool = False  # LongBench-E in the place of LongBench
    longbench_tasks: list[str] | None = None
    short_tasks: list[str] | None = None
    limit: int | None = None  # questions of a task, LongBench's and the short ones'; None: all
    beyond_window: bool = False
    seed: int = 0
    dtype: str = "bfloat16"
    engine: str = "transformers"

    def as_dict(self) -> dict:
        return asdict(self)

    @property
    def files(self) -> list[Path]:
        """The files that questions are made of."""
        named = [
            self.text,
            self.haystack,
            self.squad,
            self.hotpotqa,
            self.english_words,
            self.punkt,
            self.longbench_data,
            self.recall_form,
        ]
        return [Path(name) for name in named if name is not None]

    def check(self) -> None:
        """Raise InputError for a value that can never be right."""
        for name in "windows scored stride samples physical probe_samples ruler_samples limit".split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value}: should be at least 1")
        for name in ("seed", "ruler_seed"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: should not be negative")
        if self.stride is not None and "perplexity" not in self.suites:
            raise InputError(f"--stride {self.stride}: is of the perplexity suite, which --suite does not name")
        if self.ruler_template is not None and "ruler" not in self.suites:
            raise InputError(
                f"--ruler-template {self.ruler_template}: applies only to the ruler suite, which is not selected; "
                "add it to --suite"
            )
        if self.longbench_e and "longbench" not in self.suites:
            raise InputError(
                "--longbench-e: applies only to the longbench suite, which is not selected; add it to --suite"
            )
        if self.engine == "megatron" and "short" in self.suites:
            raise InputError("--suite short: lm-eval reads Hugging Face directories; export the model and give --hf")
        if self.engine == "vllm" and "virtual" in self.suites:
            raise InputError(
                "--suite virtual: vLLM takes no position ids; use --engine transformers or megatron for it"
            )


def parse_suites(value: str) -> list[str]:
    """Names of suites from a comma-separated list, in their fixed order.  Raises InputError for an unknown one."""
    names = parse_names(value)
    for name in names:
        if name not in SUITES:
            raise InputError(f"--suite {name}: unknown; there are {', '.join(SUITES)}")
    if not names:
        raise InputError(f"--suite {value!r}: names no suite; use some of {', '.join(SUITES)}")
    return [name for name in SUITES if name in names]


def parse_names(value: str) -> list[str]:
    """Names from a comma-separated list."""
    return [name.strip() for name in value.split(",") if name.strip()]


def parse_numbers(flag: str, value: str, kind: type = int) -> list:
    """Ascending positive numbers from a comma-separated list.  Raises InputError naming `flag`."""
    example = "4096,8192" if kind is int else "0.1,0.5,0.9"
    try:
        numbers = [kind(item) for item in value.split(",")]
    except ValueError:
        what = "integers" if kind is int else "numbers"
        raise InputError(f"{flag} {value}: should be {what} with commas between them, such as {example}") from None
    if numbers != sorted(set(numbers)):
        raise InputError(
            f"{flag} {value}: should ascend without repeats; use {','.join(map(str, sorted(set(numbers))))}"
        )
    if numbers[0] < (1 if kind is int else 0) or (kind is float and numbers[-1] > 1):
        wanted = "positive" if kind is int else "between 0 and 1"
        raise InputError(f"{flag} {value}: should be {wanted}, such as {example}")
    return numbers
