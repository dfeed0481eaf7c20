"""The report in a real Chromium: at a desk and on a phone, light and dark, printed; nothing fetched, nothing cut."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from endprompt_megatron.report.style import DARK, LIGHT
from unit import reports

from endprompt_megatron.report.page import write_report


def installed():
    """A Chromium that starts; some distributions have a name that only says how to get one."""
    for path in filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        if subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    return None


CHROMIUM = installed()
WIDTHS = {"desk": 1200, "phone": 360}
SCHEMES = {"dark": (0, DARK), "light": (1, LIGHT)}  # Chromium's number of the preferred scheme, our colours
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --no-pdf-header-footer --window-size=1580,2400"
).split()
# Frames of both widths, which the page's media queries go by; the page itself stays as it is, policy and all.
FRAMES = """<!doctype html><body style="margin: 0; display: flex; gap: 20px">{frames}<script>
addEventListener("load", () => {{
  const found = {{}};
  for (const frame of document.querySelectorAll("iframe")) {{
    const page = frame.contentDocument, shown = frame.contentWindow, all = [...page.querySelectorAll("body *")];
    const apart = all.filter(each => !each.closest(".scroll, pre, svg")), width = shown.innerWidth;
    found[frame.id] = {{
      width: width,
      scrolls: page.documentElement.scrollWidth,
      outside: apart.filter(each => each.getBoundingClientRect().right > width + 1).map(each => each.outerHTML),
      requests: shown.performance.getEntriesByType("resource").map(each => each.name),
      paper: shown.getComputedStyle(page.body).backgroundColor,
      ink: shown.getComputedStyle(page.body).color,
      pictures: [...page.querySelectorAll("figure > svg")].map(each => each.getBoundingClientRect().width),
      tables: page.querySelectorAll("table").length,
      height: page.documentElement.scrollHeight,
    }};
  }}
  document.documentElement.dataset.found = JSON.stringify(found);
}});
</script>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")


@pytest.fixture(scope="module")
def page(measured, tmp_path_factory):
    """The fullest page: two runs and a control, every suite."""
    root, made = tmp_path_factory.mktemp("browser"), measured / "made"
    runs = [reports.trained(root / "one <run>", made), reports.trained(root / "another", made, rope="yarn", level=3.5)]
    control = reports.trained(root / "control", made, "short")
    for run in (*runs, control):
        shutil.copytree(measured / "run" / "evaluation", run / "evaluation")
    return write_report(runs, control)


def browse(tmp_path, address, scheme, *options):
    profile, number = tmp_path / "profile", SCHEMES[scheme][0]
    settings = [f"--user-data-dir={profile}", f"--blink-settings=preferredColorScheme={number}"]
    done = subprocess.run(
        [CHROMIUM, *OPTIONS, *settings, *options, Path(address).as_uri()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_fits_desk_and_phone_and_fetches_nothing(page, tmp_path, scheme):
    from PIL import Image

    inside = html.escape(page.read_text())
    frames = [
        f'<iframe id="{name}" srcdoc="{inside}" style="border: 0; width: {width}px; height: 2400px"></iframe>'
        for name, width in WIDTHS.items()
    ]
    wrapper = tmp_path / "frames.html"
    wrapper.write_text(FRAMES.format(frames="".join(frames)))
    shot = tmp_path / "shot.png"
    said = browse(tmp_path, wrapper, scheme, "--dump-dom", f"--screenshot={shot}")
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', said).group(1)))
    picture = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    colours, left = SCHEMES[scheme][1], 0
    for name, width in WIDTHS.items():
        seen = found[name]
        assert seen["width"] == width
        assert seen["scrolls"] == width, f"{name}: the page scrolls sideways"
        assert seen["outside"] == [], name
        assert seen["requests"] == []
        assert (seen["paper"], seen["ink"]) == tuple(rgb(colours[each]) for each in ("paper", "ink"))
        assert seen["tables"] > 20
        assert len(seen["pictures"]) > 10
        assert all(100 < drawn <= width for drawn in seen["pictures"])
        part = picture[:, left : left + width]
        left += width + 20
        paper = np.array(numbers(colours["paper"]))
        share = (np.abs(part - paper).sum(axis=2) > 30).mean()
        assert 0.02 < share < 0.5, f"{name}: {share:.1%} of the picture is no background"
        assert len(np.unique(part.reshape(-1, 3), axis=0)) > 200
    assert found["phone"]["height"] > found["desk"]["height"]


def test_it_prints_light_and_with_its_tables_open(page, tmp_path):
    out = tmp_path / "page.pdf"
    browse(tmp_path, page, "dark", f"--print-to-pdf={out}")
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
