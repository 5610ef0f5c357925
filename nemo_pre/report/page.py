"""The report of one run: a single HTML file that needs nothing else, neither network nor scripts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median

from nemo_pre.options import PathText
from nemo_pre.plots import EXACT_MATCH
from nemo_pre.report.answers import ANSWERS, of_answers, question_types, sample_cards
from nemo_pre.report.markup import percent, text
from nemo_pre.report.provenance import provenance
from nemo_pre.report.run_charts import exact_match_charts, regularizer_charts, training_charts
from nemo_pre.report.runs import CONFIG, Run, read_run
from nemo_pre.report.samples import SampleAnswer, sample_answers
from nemo_pre.run_files.outputs import check_output_file

STYLE = Path(__file__).with_name("page.css")
# Nothing may be loaded, and nothing run, whatever a name or an answer contains.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def report(
    run: PathText,
    out: PathText = "report.html",
    model: PathText | None = None,
    num_samples: int = 12,
    data: PathText | None = None,
) -> Path:
    """Write the report of a run as one HTML file: figures, answers by question type, samples, config, provenance.

    run is the output directory of nemo-pre train, out the file to write. model is the directory of the exported
    Hugging Face model, which answers the first num_samples validation pictures; without it there are no samples.
    data is the directory of the prepared data; null: the one that the run's config names.

    Raises:
        ValueError: the run, the model or the data cannot be read.
    """
    if num_samples < 0:
        raise ValueError(f"num_samples={num_samples} is negative: give 0 or more.")
    read = read_run(run)
    where = data or (read.options or {}).get("data.path")
    samples: list[SampleAnswer] | None = None
    check_output_file("out", out)
    if model is not None:
        if not where:
            raise ValueError(f"{run} does not tell where its data are: give data=DIRECTORY.")
        samples = sample_answers(model, where, num_samples)
    path = Path(out)
    path.write_text(render(read, samples, provenance(read, where, model)), encoding="utf-8")
    for sample in (samples or [])[:1]:
        print(f"asked: {sample.question} | answered: {sample.answer} | expected: {sample.expected}")
    print(f"{path}: {path.stat().st_size / 1e3:,.0f} kB, needs no other file; next: open it in a browser")
    return path


def render(run: Run, samples: Sequence[SampleAnswer] | None, facts: dict[str, str]) -> str:
    """The page; ``samples`` None where no model was asked, ``facts`` the table of the provenance."""
    name = _name(run)
    sections = [
        _section("Training", _charts(training_charts(run))),
        _section("Regularizers", _charts(regularizer_charts(run))),
        _section("Exact match by question type", question_types(run) + _charts(exact_match_charts(run))),
        _section("Sample answers", sample_cards(samples)),
        _section("Config", _config(run)),
        _section("Provenance", _facts(facts)),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(name)}: report</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<h1>{text(name)}</h1>
<p class="soft">{text(_when(run))}</p>
{_tiles(run)}
{_notes(run)}
</header>
<main>
{"".join(sections)}</main>
<footer>Written by nemo-pre. Thin lines are the records, thick lines their moving mean.</footer>
</body>
</html>
"""


# --- headline -------------------------------------------------------------------------------------------------------


def _name(run: Run) -> str:
    return str((run.options or {}).get("name") or run.directory.resolve().name)


def _when(run: Run) -> str:
    if run.started is None or run.ended is None:
        return "date unknown"
    started, ended = datetime.fromtimestamp(run.started), datetime.fromtimestamp(run.ended)
    until = f"{ended:%H:%M}" if started.date() == ended.date() else f"{ended:%Y-%m-%d %H:%M}"
    return f"{started:%Y-%m-%d %H:%M} to {until}"


def _tiles(run: Run) -> str:
    planned = (run.options or {}).get("trainer.max_steps")
    tiles = [("steps", f"{run.last_step:,}", f"of {planned:,}" if isinstance(planned, int) else "")]
    for label, metric in (("final training loss", "lm/loss"), ("validation loss", "val/lm_loss")):
        if (value := run.last(metric)) is not None:
            tiles.append((label, f"{value:.4g}", f"nats per token, step {max(run.series[metric]):,}"))
    if (share := run.last(EXACT_MATCH)) is not None:
        tiles.append(("exact match", percent(share), of_answers(share, run.last(ANSWERS))))
    if (speed := _median(run.series.get("samples_per_second", {}).values())) is not None:
        shown = f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
        tiles.append(("speed", shown, "samples per second, median"))
    boxes = (
        f"<div><dt>{text(label)}</dt><dd>{text(value)}<small>{text(more)}</small></dd></div>"
        for label, value, more in tiles
    )
    return f'<dl class="tiles">{"".join(boxes)}</dl>'


def _notes(run: Run) -> str:
    if not run.notes:
        return ""
    return f'<ul class="notes">{"".join(f"<li>{text(note)}</li>" for note in run.notes)}</ul>'


def _charts(charts: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


# --- config and provenance ------------------------------------------------------------------------------------------


def _config(run: Run) -> str:
    if run.options is None:
        return '<p class="soft">The run has no config.yaml.</p>'
    resolved = (run.directory / CONFIG).read_text(encoding="utf-8", errors="replace")
    return f"<details><summary>{CONFIG}, resolved</summary><pre>{text(resolved)}</pre></details>"


def _facts(facts: dict[str, str]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in facts.items()
    )
    return f'<div class="block"><table class="facts"><tbody>{rows}</tbody></table></div>'


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{text(title)}</h2>\n{content}\n</section>\n" if content else ""


def _median(values: Iterable[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return median(finite) if finite else None
