"""Charts keep what they draw inside their frame, whatever the numbers."""

from __future__ import annotations

import re

import pytest

from nemo_pre.report.charts import WIDTH, Line, line_chart

WIDE_DIGIT = 0.636  # of the font's size, in DejaVu Sans; the style sheet sets 12 px
ENDS = [
    (0, 1),
    (0.011, 0.0142),
    (1.2e-4, 1.45e-4),
    (-3e-7, 1e-7),
    (9876.25, 9877.5),
    (-12_000, 35_000),
    (1e6, 3e6),
    (5, 5),
]


@pytest.mark.parametrize(("low", "high"), ENDS)
@pytest.mark.parametrize("last", [10, 1500, 12_500, 250_000])
def test_no_label_is_clipped_and_none_lies_on_the_curve(low, high, last):
    html = line_chart("a title", [Line("", [(0, low), (last, high)])], "step")
    texts = re.findall(r'<text x="([\d.-]+)" y="[\d.-]+"(?: dy="0.35em")? text-anchor="(\w+)">([^<]*)</text>', html)
    left = float(re.search(r'<path class="axis" d="M([\d.]+) \d+H', html)[1])
    assert len(texts) > 4
    for x, anchor, label in texts:
        width = 12 * WIDE_DIGIT * len(label)
        start = float(x) - width * {"end": 1, "middle": 0.5}[anchor]
        assert start >= 0 and start + width <= WIDTH, label
    assert all(float(x) < left for x, _, _ in re.findall(r'<text x="([\d.]+)" y="([\d.]+)" dy="(0.35em)"', html))
    first = re.search(r'<path class="line line0" d="M([\d.]+) ', html)
    assert float(first[1]) == left, "the curve begins where the axis does"
