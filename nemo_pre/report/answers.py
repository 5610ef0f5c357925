"""A run's answers in its report: exact match by question type, and sample pictures with what the model said."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

from nemo_pre.plots import EXACT_MATCH
from nemo_pre.report.charts import share_bar
from nemo_pre.report.intervals import wilson
from nemo_pre.report.markup import percent, text
from nemo_pre.report.runs import Run, natural
from nemo_pre.report.samples import SampleAnswer

ANSWERS = "val/answers"
PIXELATED = 128  # pictures of at most so many pixels a side are enlarged without blur


def question_metrics(run: Run) -> dict[str, str]:
    names = sorted((name for name in run.series if name.startswith(f"{EXACT_MATCH}/")), key=natural)
    return {name.removeprefix(f"{EXACT_MATCH}/"): name for name in names}


def question_types(run: Run) -> str:
    if EXACT_MATCH not in run.series:
        return '<p class="soft">The run recorded no validation.</p>'
    last = max(run.series[EXACT_MATCH])
    rows = [_share_row("all", run, EXACT_MATCH, ANSWERS)]
    rows += [
        _share_row(kind, run, metric, f"{ANSWERS}/{kind}")
        for kind, metric in question_metrics(run).items()
        if max(run.series[metric]) == last
    ]
    return (
        f'<p class="soft">Step {last:,}. The whiskers are 95% intervals (Wilson) of a share of n answers: what '
        "another draw of questions would change, not another seed.</p>"
        '<div class="block"><table class="shares"><thead><tr><th>question</th><th class="wide"></th>'
        '<th class="number">exact</th><th class="number interval">95% interval</th><th class="number">n</th></tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _share_row(kind: str, run: Run, metric: str, count: str) -> str:
    share, answers = run.last(metric), run.last(count)
    assert share is not None
    if not math.isfinite(share):
        return f'<tr><th scope="row">{text(kind)}</th><td colspan="4">not finite</td></tr>'
    low, high = _interval(share, answers) or (None, None)
    shown = "" if low is None or high is None else f"{percent(low)} to {percent(high)}"
    label = f"{kind}: {percent(share)} {of_answers(share, answers)}"
    return (
        f'<tr><th scope="row">{text(kind)}</th><td class="wide">{share_bar(share, low, high, label)}</td>'
        f'<td class="number">{percent(share)}</td><td class="number interval">{shown}</td>'
        f'<td class="number">{f"{answers:,.0f}" if answers else "?"}</td></tr>'
    )


def _interval(share: float, answers: float | None) -> tuple[float, float] | None:
    if not answers or not math.isfinite(answers) or not math.isfinite(share):
        return None
    return wilson(round(share * answers), round(answers))


def of_answers(share: float, answers: float | None) -> str:
    interval = _interval(share, answers)
    return f"of {answers:,.0f} ({percent(interval[0])} to {percent(interval[1])})" if interval else ""


def sample_cards(samples: Sequence[SampleAnswer] | None) -> str:
    if samples is None:
        return '<p class="soft">No model was asked: model=DIRECTORY of the exported model shows its answers here.</p>'
    if not samples:
        return '<p class="soft">The validation data hold no pictures.</p>'
    right = sum(sample.correct for sample in samples)
    cards = "".join(_sample(sample) for sample in samples)
    return (
        f'<p class="soft">The first {len(samples)} validation pictures, answered by the exported model: {right} '
        f'right. Too few to judge by.</p><div class="samples">{cards}</div>'
    )


def _sample(sample: SampleAnswer) -> str:
    verdict, mark = ("right", "\u2713") if sample.correct else ("wrong", "\u2717")
    width, height = _png_size(sample.picture)
    small = ' class="small"' if max(width, height) <= PIXELATED else ""
    picture = base64.b64encode(sample.picture).decode()
    answer = text(sample.answer) or '<i class="soft">nothing</i>'
    return (
        f'<article class="sample is-{verdict}"><header><span class="soft">{text(sample.question_type)}</span>'
        f'<span class="verdict">{mark} {verdict}</span></header>'
        f'<img{small} width="{width}" height="{height}" alt="{text(sample.key)}" '
        f'src="data:image/png;base64,{picture}">'
        f"<dl><dt>question</dt><dd>{text(sample.question)}</dd><dt>expected</dt><dd>{text(sample.expected)}</dd>"
        f"<dt>answer</dt><dd>{answer}</dd></dl></article>"
    )


def _png_size(picture: bytes) -> tuple[int, int]:
    return int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:24], "big")
