"""What the report says of its pictures is true of the data behind them."""

from __future__ import annotations

from nemo_pre.diagnostics.report import render
from tests.diagnostics.recorded import results


def test_clouds_without_masks_say_why_they_are_grey():
    with_masks = results("a run")
    without = {**with_masks, "data": {**with_masks["data"], "masks": False}}
    assert "coloured by what the patch shows" in render(with_masks, []) and "grey" not in render(with_masks, [])
    said = render(without, [])
    assert "all grey, since these data have no masks that say what a patch shows" in said
    assert "coloured by what the patch shows" not in said
