"""What preflight found: one line per check, one verdict, and a compact way to name the nodes that differ.

A check is a function that returns Findings, or raises InputError with what is wrong.  `checked` turns this error, and
any unexpected one, into a finding too, so that no check prevents the others from running.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from endprompt_megatron.common.errors import EXIT_DONE, EXIT_INPUT, InputError

OK, WARN, FAIL, NOT_RUN = "ok", "warn", "FAIL", "-"


@dataclass(frozen=True)
class Finding:
    """One line of the table.  `verdict` is ok, warn, FAIL, or - for a check that could not run (`found`: why)."""

    check: str
    found: str
    verdict: str = OK


Findings = Finding | list[Finding]


def checked(name: str, function: Callable[..., Findings], *arguments: object) -> list[Finding]:
    """Findings of `function(*arguments)`; what it raises is a FAIL under `name`."""
    try:
        found = function(*arguments)
    except InputError as error:
        return [Finding(name, str(error), FAIL)]
    except Exception as error:  # a check that breaks must not stop the others
        reason = " ".join(str(error).split())[:200]
        return [Finding(name, f"could not be checked ({type(error).__name__}: {reason})", FAIL)]
    return found if isinstance(found, list) else [found]


def worst(verdicts: Iterable[str]) -> str:
    """The worst of several verdicts; ok if there is none."""
    return max(verdicts, key=(NOT_RUN, OK, WARN, FAIL).index, default=OK)


def failed(findings: list[Finding]) -> list[str]:
    """Names of the checks that failed, each once, in the table's order."""
    return list(dict.fromkeys(finding.check for finding in findings if finding.verdict == FAIL))


def exit_code(findings: list[Finding]) -> int:
    """0 if nothing failed, 2 otherwise."""
    return EXIT_INPUT if failed(findings) else EXIT_DONE


def verdict_line(findings: list[Finding]) -> str:
    """The last line: `preflight: ready`, or how many checks failed and which."""
    names = failed(findings)
    if names:
        return f"preflight: {len(names)} check{'s' * (len(names) > 1)} failed: {', '.join(names)}"
    warnings = list(dict.fromkeys(finding.check for finding in findings if finding.verdict == WARN))
    if not warnings:
        return "preflight: ready"
    return f"preflight: ready, with {len(warnings)} warning{'s' * (len(warnings) > 1)}: {', '.join(warnings)}"


def as_table(findings: list[Finding]) -> str:
    """The table: check, verdict, what was found; one line per check, however long."""
    rows = [("check", "verdict", "found"), *((f.check, f.verdict, f.found) for f in findings)]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{name:<{width}}  {verdict:<7}  {found}".rstrip() for name, verdict, found in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_json(findings: list[Finding]) -> dict:
    """`{"ready": ..., "verdict": ..., "checks": [{check, found, verdict}]}`."""
    return {
        "ready": not failed(findings),
        "verdict": verdict_line(findings),
        "checks": [asdict(finding) for finding in findings],
    }


def join_names(names: Iterable[object], max_names: int = 4) -> str:
    """Names for a sentence, at most `max_names` of them: n1, n2, n3, n4 and 12 more."""
    listed = [str(name) for name in names]
    rest = f" and {len(listed) - max_names} more" if len(listed) > max_names else ""
    return ", ".join(listed[:max_names]) + rest


def group_by_node(values: dict[str, object]) -> str:
    """The value if all nodes have the same; otherwise each value with its nodes, the most common first."""
    nodes: dict[str, list[str]] = {}
    for node, value in values.items():
        nodes.setdefault(str(value), []).append(node)
    if len(nodes) <= 1:
        return next(iter(nodes), "")
    groups = sorted(nodes.items(), key=lambda group: -len(group[1]))
    return ", ".join(f"{value} on {join_names(names)}" for value, names in groups)
