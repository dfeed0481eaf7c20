"""What gpu.py found, as a page: the machine, the tests, the time of a step."""

from endprompt_megatron.common.html_page import Bullets, Cell, Details, Page, Paragraph, Row, Section, Table, render
from endprompt_megatron.common.html_page import Code as CodeBlock

SUITES = {"with": "With Transformer Engine", "without": "Without Transformer Engine"}
SIGNS = {"passed": "better", "failed": "worse", "skipped": ""}


def page(results: dict) -> str:
    """The page as HTML, of results.json."""
    about = results["about"]
    gpus = about["gpus"]
    said = f"{len(gpus)} x {gpus[0]}" if gpus else "no GPU: a rehearsal, in which nothing was measured"
    return render(
        Page(
            title="endprompt_megatron on a GPU",
            heading="endprompt_megatron on a GPU",
            kind=said,
            facts=[(name, str(value)) for name, value in about.items() if name not in ("gpus", "broken")],
            sections=[
                *(_tests(kind, found) for kind, found in results["tests"].items()),
                _benchmarks(results["benchmarks"]),
            ],
        )
    )


def _tests(kind: str, found: dict[str, dict]) -> Section:
    files: dict[str, list[dict]] = {}
    for name, test in found.items():
        files.setdefault(name.partition("::")[0], []).append(test)
    rows = [
        Row(Cell(file.rpartition("/")[2], code=True), [_count(tests, outcome) for outcome in SIGNS])
        for file, tests in files.items()
    ]
    blocks = [Table(list(SIGNS), rows, first="file")] if rows else [Paragraph("Not run.", "missing")]
    for name, test in found.items():
        if test["outcome"] == "failed":
            blocks.append(Details(name.rpartition("/")[2], [CodeBlock(test["reason"])]))
    skipped = sorted({f"{test['reason']}" for test in found.values() if test["outcome"] == "skipped"})
    if skipped:
        blocks.append(Details("Why tests were skipped", [Bullets(skipped)]))
    measured = [f"{name}: {test['properties']}" for name, test in found.items() if test.get("properties")]
    if measured:
        blocks.append(Details("What tests measured", [Bullets(measured)]))
    return Section(f"tests-{kind}", SUITES[kind], blocks)


def _count(tests: list[dict], outcome: str) -> Cell:
    count = sum(test["outcome"] == outcome for test in tests)
    return Cell(str(count), sign=SIGNS[outcome] if count else "")


def _benchmarks(found: dict[str, dict]) -> Section:
    first = next((each for each in found.values() if "seconds" in each), None)
    rows = [Row(name, _figures(each, first)) for name, each in found.items()]
    head = ["a step", "tokens/s", "against the first", "model TFLOP/s", "peak memory", "planned"]
    blocks = [Table(head, rows, first="contender")] if rows else [Paragraph("Not run.", "missing")]
    return Section("benchmarks", "A training step", blocks)


def _figures(each: dict, first: dict | None) -> list[str]:
    if "seconds" not in each:
        return [each["error"], *[""] * 5]
    low, high = each["range"]
    return [
        f"{each['seconds']:.3f} s ({low:.3f} to {high:.3f})",
        f"{each['tokens_per_s']:,.0f}",
        f"{each['tokens_per_s'] / first['tokens_per_s']:.2f}",
        f"{each['tflops']:.0f}",
        *(f"{each[key]:.1f} GiB" if each.get(key) else "" for key in ("peak_gib", "planned_gib")),
    ]
