"""What README and docs point to exists: files, modules, tools, pages in the index."""

import re

import pytest
import yaml
from small import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
FOLDERS = "endprompt_megatron|tools|slurm|recipes|benchmarks|tests"
EXAMPLES = {"recipes/my.yaml", "tools/preprocess_data.py"}  # not there; the second is Megatron-LM's
names = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@names
def test_every_relative_link_of_a_page_points_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


@names
def test_every_file_of_the_project_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(rf"(?<![\w/.])((?:{FOLDERS})/[\w./-]+)(?![\w*])", text):
        path = path.rstrip(".")
        assert (ROOT / path).exists() or "NAME" in path or path in EXAMPLES, path


def test_readme_is_short_enough_to_read():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= set(re.findall(r"\]\(([\w.]+\.md)\)", index))


def test_the_modules_of_the_architecture_page_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = {path.name for path in (ROOT / "endprompt_megatron").rglob("*.py")}
    assert set(re.findall(r"`(?:[\w/]+/)?(\w+\.py)`", text)) <= modules


def test_the_citation_is_whole():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version"} <= set(citation)
    assert len(citation["references"][0]["authors"]) == 12
