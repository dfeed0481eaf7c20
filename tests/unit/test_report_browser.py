"""The report's and the study's page in a real Chromium: at a desk and on a phone, light and dark, printed."""

import io
import json
import shutil
import subprocess

import numpy as np
import pytest
from small import ROOT
from unit import chromium, reports

from endprompt_megatron.common.html_page import DARK, LIGHT
from endprompt_megatron.report.page import write_report
from endprompt_megatron.study.pages import as_html

CHROMIUM = chromium.installed()
WIDTHS = {"desk": 1200, "phone": 360}
SCHEMES = {"dark": DARK, "light": LIGHT}
LEAST = {"report": (20, 10), "study": (10, 5)}  # tables and pictures of each page
LOOK = """(() => {
  const all = [...document.querySelectorAll("body *")], width = innerWidth;
  const apart = all.filter(each => !each.closest(".scroll, pre, svg"));
  return {
    width: width,
    scrolls: document.documentElement.scrollWidth,
    outside: apart.filter(each => each.getBoundingClientRect().right > width + 1).map(each => each.outerHTML),
    requests: performance.getEntriesByType("resource").map(each => each.name),
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    pictures: [...document.querySelectorAll("figure > svg")].map(each => each.getBoundingClientRect().width),
    drawn: document.querySelectorAll("svg").length,
    tables: document.querySelectorAll("table").length,
    height: document.documentElement.scrollHeight,
  };
})()"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")


@pytest.fixture(scope="module")
def pages(measured, tmp_path_factory):
    """The fullest report, of two runs and a control by every suite, and the published study."""
    root, made = tmp_path_factory.mktemp("browser"), measured / "made"
    runs = [reports.trained(root / "one <run>", made), reports.trained(root / "another", made, rope="yarn", level=3.5)]
    control = reports.trained(root / "control", made, "short")
    for run in (*runs, control):
        shutil.copytree(measured / "run" / "evaluation", run / "evaluation")
    study = root / "study.html"
    study.write_text(as_html(json.loads((ROOT / "benchmarks" / "study" / "results.json").read_text())))
    return {"report": write_report(runs, control), "study": study}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.Chromium(CHROMIUM, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", LEAST)
def test_html_page_fits_desk_and_phone_and_fetches_nothing(pages, browser, name, scheme):
    from PIL import Image

    colours, heights = SCHEMES[scheme], {}
    for device, width in WIDTHS.items():
        browser.open(pages[name], width, 2400, scheme)
        seen = browser.evaluate(LOOK)
        assert seen["width"] == width
        assert seen["scrolls"] == width, f"{device}: the page scrolls sideways"
        assert seen["outside"] == [], device
        assert seen["requests"] == []
        assert (seen["paper"], seen["ink"]) == tuple(rgb(colours[each]) for each in ("paper", "ink"))
        tables, pictures = LEAST[name]
        assert seen["tables"] > tables
        assert seen["drawn"] > pictures
        assert all(100 < drawn <= width for drawn in seen["pictures"])
        picture = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB")).astype(int)
        share = (np.abs(picture - np.array(numbers(colours["paper"]))).sum(axis=2) > 30).mean()
        assert 0.02 < share < 0.5, f"{device}: {share:.1%} of the picture is not background"
        assert len(np.unique(picture @ (65536, 256, 1))) > 200  # colours
        heights[device] = seen["height"]
    assert heights["phone"] > heights["desk"]


def test_report_prints_light_and_with_its_tables_open(pages, browser, tmp_path):
    browser.open(pages["report"], 1200, 2400, "dark")
    out = tmp_path / "page.pdf"
    out.write_bytes(browser.pdf())
    assert out.read_bytes().startswith(b"%PDF")
    if shutil.which("pdftotext") is None:
        pytest.skip("pdftotext is not installed (poppler-utils): the print's text is not read")
    text = subprocess.run(["pdftotext", "-layout", out, "-"], capture_output=True, text=True, check=True).stdout
    assert "85.48" in text  # of a folded table
    assert "prompt_loss_weight" not in text  # recipes stay folded
    for heading in ("Results", "RULER", "Distances trained", "What is not shown"):
        assert heading in text


def numbers(colour):
    return [int(colour[place : place + 2], 16) for place in (1, 3, 5)]


def rgb(colour):
    return f"rgb({', '.join(map(str, numbers(colour)))})"
