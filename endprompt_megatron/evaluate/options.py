"""Command-line options of the suites: declared once, read from the command line, checked, and shown in --help.

A suite declares its options (suite.py).  Those that several suites share stand here, so that all of them declare
the same one.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from endprompt_megatron.common.errors import InputError


def parse_names(flag: str, value: str) -> list[str]:
    """Names from a comma-separated list."""
    return [name.strip() for name in value.split(",") if name.strip()]


def parse_lengths(flag: str, value: str) -> list[int]:
    """Ascending positive integers from a comma-separated list.  Raises InputError naming `flag`."""
    numbers = _ascending(flag, value, int, "integers", "4096,8192")
    if numbers[0] < 1:
        raise InputError(f"{flag} {value}: should be positive, such as 4096,8192")
    return numbers


def parse_shares(flag: str, value: str) -> list[float]:
    """Ascending numbers between 0 and 1 from a comma-separated list.  Raises InputError naming `flag`."""
    numbers = _ascending(flag, value, float, "numbers", "0.1,0.5,0.9")
    if not 0 <= numbers[0] <= numbers[-1] <= 1:
        raise InputError(f"{flag} {value}: should be between 0 and 1, such as 0.1,0.5,0.9")
    return numbers


def _ascending(flag: str, value: str, kind: type, what: str, example: str) -> list:
    try:
        numbers = [kind(item) for item in value.split(",")]
    except ValueError:
        raise InputError(f"{flag} {value}: should be {what} with commas between them, such as {example}") from None
    if numbers != sorted(set(numbers)):
        raise InputError(
            f"{flag} {value}: should ascend without repeats; use {','.join(map(str, sorted(set(numbers))))}"
        )
    return numbers


@dataclass(frozen=True)
class Option:
    """One option.  `name` is its key in Settings and in results.json; on the command line, --name with dashes.

    `default` None means that the option is not given, and `help` says what happens then.
    """

    name: str
    help: str
    type: type = str  # of the plain value: str, int, or bool for a flag without a value
    parse: Callable[[str, str], Any] | None = None  # of a list: (flag, text) -> value; may raise InputError
    default: Any = None
    choices: tuple[str, ...] | None = None
    minimum: int | None = None
    metavar: str | None = None
    is_file: bool = False  # a file or directory that inputs are made of: another content makes other inputs
    refused_without_suite: bool = False  # given where no suite that has it is selected, it is an error

    @property
    def flag(self) -> str:
        """As on the command line."""
        return "--" + self.name.replace("_", "-")

    def add_to(self, parser: Any) -> None:
        """Add the option to an argparse parser or group."""
        if self.type is bool:
            parser.add_argument(self.flag, action="store_true", help=self.help)
            return
        default = ",".join(map(str, self.default)) if isinstance(self.default, tuple) else self.default
        parser.add_argument(
            self.flag,
            type=self.type,
            default=default,
            choices=self.choices,
            metavar=self.metavar if not self.choices else None,
            help=self.help,
        )

    def value(self, options: argparse.Namespace) -> Any:
        """The option's value on a parsed command line.  Raises InputError."""
        given = getattr(options, self.name)
        return self.parse(self.flag, given) if self.parse is not None and given else given

    def check(self, value: Any) -> None:
        """Raise InputError for a value below the minimum."""
        if value is None or self.minimum is None or value >= self.minimum:
            return
        wanted = "should not be negative" if self.minimum == 0 else f"should be at least {self.minimum}"
        raise InputError(f"{self.flag} {value}: {wanted}")


TEXT = Option("text", "held-out text: a UTF-8 file, or the PREFIX of a prepared dataset", metavar="FILE", is_file=True)
SAMPLES = Option("samples", "inputs for each combination of length and depth or distance", int, default=1, minimum=1)
TEMPLATE = Option(
    "template", "ask in plain text (base) or in the model's chat template", choices=("base", "chat"), default="base"
)
LIMIT = Option("limit", "ask only the first N questions of each task", int, minimum=1, metavar="N")
