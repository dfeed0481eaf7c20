"""What the documentation says of the study is what its stored comparison says."""

import json
import sys

from small import ROOT

from endprompt_megatron.study.pages import as_markdown

sys.path.insert(0, str(ROOT / "benchmarks" / "study"))
import table

STORED = json.loads(table.RESULTS.read_text(encoding="utf-8"))


def test_study_page_is_the_stored_comparison():
    assert (ROOT / "docs" / "study.md").read_text(encoding="utf-8") == as_markdown(STORED)


def test_readme_table_is_the_stored_study_comparison():
    assert table.table(STORED) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_of_rope_scalings_is_the_stored_study_comparison():
    assert table.table(STORED, table.SCALINGS) in (ROOT / "docs" / "rope.md").read_text(encoding="utf-8")


def test_every_published_study_variant_has_three_base_models_equal_tokens_and_a_chosen_rate():
    trained = [row for row in STORED["rows"] if row["training"]]
    assert not STORED["missing"]
    assert {len(row["cells"]) for row in STORED["rows"]} == {3}
    assert len({row["training"]["tokens"] for row in trained}) == 1
    assert {row["name"] for row in STORED["sweep"]["rows"]} == {row["name"] for row in trained}
    assert STORED["sweep"]["evaluation"]["text"] != STORED["evaluation"]["text"]
