"""The report in a real browser, where one is installed: it fits a desktop and a phone, and a click asks a patch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nemo_pre.diagnostics.report import render
from tests.diagnostics.recorded import SIDE, results

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")

# The page lies unchanged, with its own policy, in a frame as wide as the screen; the page around it clicks and looks.
AROUND = """<!DOCTYPE html><body style="margin:0"><iframe style="border:0" width="WIDTH" height="7000"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, picture = page.querySelector(".asked"), box = picture.getBoundingClientRect();
  const map = page.querySelectorAll("img[data-cosines]")[1], before = map.src;
  const at = { clientX: box.left + 0.9 * box.width, clientY: box.top + 0.6 * box.height };
  const initial = page.querySelector(".shows").textContent;
  picture.dispatchEvent(new MouseEvent("click", at));
  const clicked = page.querySelector(".shows").textContent;
  picture.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
  const root = page.documentElement, said = document.createElement("pre");
  said.textContent = JSON.stringify({
    wide: root.scrollWidth, screen: frame.clientWidth, charts: page.querySelectorAll("figure.chart > svg").length,
    initial, clicked, moved: page.querySelector(".shows").textContent, redrawn: map.src !== before,
    left: page.querySelector(".frame").style.left, broken: [...page.images].filter((i) => !i.naturalWidth).length,
  });
  document.body.append(said);
};
frame.srcdoc = PAGE;
</script></body>"""


def browsed(tmp_path: Path, width: int) -> tuple[dict[str, Any], Path]:
    """What the page said of itself, and its screenshot."""
    page = render(results("one"), [results("another", shift=0.1)])
    content = json.dumps(page).replace("</", "<\\/")
    around, shot = tmp_path / "around.html", tmp_path / f"{width}.png"
    around.write_text(AROUND.replace("WIDTH", str(width)).replace("PAGE", content), encoding="utf-8")
    common = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    common += [f"--window-size={max(width, 600)},7000", "--virtual-time-budget=4000"]
    environment = {**os.environ, "HOME": str(tmp_path)}

    def run(*how: str) -> str:
        command = [*common, *how, around.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment).stdout

    said = re.search(r"<pre>(.*?)</pre>", run("--dump-dom"), re.DOTALL)
    assert said, "the page did not load"
    run(f"--screenshot={shot}")
    return json.loads(unescape(said[1])), shot


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_the_report_fits_the_screen_and_a_click_asks_another_patch(width, tmp_path):
    said, shot = browsed(tmp_path, width)
    assert said["wide"] <= said["screen"] == width
    assert said["charts"] == 15 and said["broken"] == 0
    assert said["initial"].startswith("digit")
    assert said["clicked"] == f"row 4, column {SIDE}" and said["moved"] == f"row 4, column {SIDE - 1}"
    assert said["redrawn"] and float(said["left"].removesuffix("%")) == pytest.approx(
        100 * (SIDE - 2) / SIDE, abs=0.01
    )
    drawn = Image.open(shot).convert("RGB").crop((0, 0, width, 6000))
    assert drawn.size[0] == width
    assert len(drawn.getcolors(1 << 24)) > 1000  # curves, maps and clouds, not an empty page
