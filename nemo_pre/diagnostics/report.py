"""The diagnostics as one HTML file that needs nothing else: curves over layers, pictures, tables, definitions."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_pre.diagnostics.definitions import MEASURES, PROBES, definitions
from nemo_pre.diagnostics.pictures import colour_bytes
from nemo_pre.diagnostics.results import Results
from nemo_pre.report.charts import Line, line_chart
from nemo_pre.report.markup import percent, text
from nemo_pre.report.page import POLICY, STYLE

OWN_STYLE = Path(__file__).with_name("diagnostics.css")
SCRIPT = Path(__file__).with_name("patches.js")
FROM_ZERO = ("effective_dimension", "length", "distance_to_layer_0")  # charts whose axis begins there
MOST_RUNS = 4  # the style sheet tells this many lines apart


def render(results: Results, others: Sequence[Results] = ()) -> str:
    """The page of ``results``, with the curves of ``others`` beside.

    Raises:
        ValueError: more runs than lines can be told apart.
    """
    runs = [results, *others]
    if len(runs) > MOST_RUNS:
        raise ValueError(f"{len(runs)} runs do not fit into one chart: compare at most {MOST_RUNS - 1} others.")
    sections = [
        ("Layer by layer", f'<div class="charts">{"".join(_charts(runs))}</div>'),
        ("Attention of text to visual tokens by head", _heads(runs)),
        ("Language against vision over training", _trade_offs(runs)),
        ("What is like a patch", _heat_maps(results)),
        ("Visual tokens by t-SNE", _clouds(results)),
        ("Logit lens of the last layer", _words(runs)),
        ("Numbers", "".join(map(_table, runs))),
        ("How each number is defined", definitions(results)),
        ("Provenance", "".join(map(_provenance, runs))),
    ]
    script = SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"{POLICY}; script-src 'sha256-{digest}'"
    body = "".join(f"<section>\n<h2>{title}</h2>\n{content}\n</section>\n" for title, content in sections if content)
    title = text(results["title"])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: visual tokens</title>
<style>
{STYLE.read_text(encoding="utf-8")}{OWN_STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<h1>{title}: visual tokens</h1>
<p class="soft">{text(_measured_on(results))}</p>
</header>
<main>
{body}</main>
<footer>Written by nemo-pre. Layer 0 is what enters the decoder, layer l the output of block l, before the final
norm.</footer>
<script>{script}</script>
</body>
</html>
"""


def _measured_on(results: Results) -> str:
    data = results["data"]
    fit = f"; probes fitted on {data['probe_fit_images']:,} of the train split" if data["probe_fit_images"] else ""
    return f"{data['images']:,} images of the val split of {data['path']}{fit}"


# --- curves ---------------------------------------------------------------------------------------------------------


def _charts(runs: Sequence[Results]) -> list[str]:
    charts = []
    for name, title, _ in MEASURES:
        lines = _lines(runs, _value_of(name))
        if lines:
            charts.append(line_chart(title, lines, "layer", zero=name in FROM_ZERO))
    for task, (title, _) in PROBES.items():
        lines = _lines(runs, _accuracy_of(task))
        if lines:
            ranged = [_with_interval(line, run, task) for line, run in zip(lines, runs, strict=True)]
            charts.append(line_chart(f"{title}, accuracy", ranged, "layer"))
    return charts


def _heads(runs: Sequence[Results]) -> str:
    """A grid per run, a row per layer and a column per head, the fuller the more."""
    grids = []
    for run in runs:
        rows = [(layer["layer"], layer["attention_to_visual_by_head"]) for layer in run["layers"]]
        rows = [(layer, shares) for layer, shares in rows if shares]
        if not rows:
            continue
        cells = "".join(
            f'<rect class="cell" x="{head}" y="{place}" width="0.94" height="0.94" fill-opacity="{share:.3f}">'
            f"<title>layer {layer}, head {head + 1}: {percent(share)}</title></rect>"
            for place, (layer, shares) in enumerate(rows)
            for head, share in enumerate(shares)
        )
        size = f"0 0 {len(rows[0][1])} {len(rows)}"
        told = f"{run['title']}: layers {rows[0][0]} to {rows[-1][0]} from top to bottom, heads from left to right"
        grids.append(
            f'<figure class="chart"><figcaption>{text(told)}</figcaption><svg class="heads" viewBox="{size}" '
            f'preserveAspectRatio="none" role="img" aria-label="{text(told)}">{cells}</svg></figure>'
        )
    told = "Colour from none (0%) to full (100%) of the attention of the text behind the image."
    return f'<p>{told}</p><div class="charts">{"".join(grids)}</div>' if grids else ""


def _trade_offs(runs: Sequence[Results]) -> str:
    """Probes at the middle layer over the loss, a path per run."""
    charts = []
    for task, (title, _) in PROBES.items():
        lines = [
            Line(
                run["title"], [(at["loss"], at["probes"][task]) for at in run["over_training"] if task in at["probes"]]
            )
            for run in runs
        ]
        if any(line.points for line in lines):
            layer = runs[0]["layers"][-1]["layer"] // 2
            charts.append(line_chart(f"{title}, layer {layer}", lines, "loss (nats per token)"))
    told = (
        "Each point is a record during training, on fewer images than above; a run goes from right to left as its "
        "language improves."
    )
    return f'<p>{told}</p><div class="charts">{"".join(charts)}</div>' if charts else ""


def _value_of(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda layer: layer.get(name)  # a page may compare with results from before the measure


def _accuracy_of(task: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda layer: layer["probe"].get(task, {}).get("accuracy")


def _with_interval(line: Line, run: Results, task: str) -> Line:
    """The ends of the 95% intervals as thin lines, with a gap between the lower and the upper."""
    layers = [layer for layer in run["layers"] if task in layer["probe"]]
    low, high = ([(float(layer["layer"]), layer["probe"][task][end]) for layer in layers] for end in ("low", "high"))
    return Line(line.label, line.points, faint=[*low, (0.0, math.nan), *high])


def _lines(runs: Sequence[Results], value: Callable[[dict[str, Any]], float | None]) -> list[Line]:
    """One line a run; a run without any value has none, but keeps its place among the styles."""
    lines = []
    for run in runs:
        found = [(layer["layer"], value(layer)) for layer in run["layers"]]
        lines.append(Line(run["title"], [(float(n), math.nan if y is None else float(y)) for n, y in found]))
    return lines if any(math.isfinite(y) for line in lines for _, y in line.points) else []


# --- pictures -------------------------------------------------------------------------------------------------------


def _heat_maps(results: Results) -> str:
    rows = "".join(map(_patch_row, results["pictures"]["heat_maps"]))
    if not rows:
        return ""
    told = (
        "Cosine of the framed patch to every patch of its image: dark is the smallest of the map, bright the largest; "
        "the numbers say which these are. Click another patch of a picture, or move by arrow keys."
    )
    return f"<p>{told}</p>{rows}"


def _patch_row(maps: Results) -> str:
    rows, columns, patch = maps["rows"], maps["columns"], maps["asked"]
    place = f"left:{100 * (patch % columns) / columns}%;top:{100 * (patch // columns) / rows}%"
    size = f"width:{100 / columns}%;height:{100 / rows}%"
    can_ask = (
        f' data-colours="{colour_bytes()}" data-rows="{rows}" data-columns="{columns}" data-patch="{patch}"'
        if maps["cosines"]
        else ""
    )
    focus = ' tabindex="0" role="application" aria-label="picture: arrow keys ask another patch"' if can_ask else ""
    figures = [
        f'<figure><div class="asked"{focus}><img src="{text(maps["picture"])}" alt="the picture">'
        f'<span class="frame" style="{place};{size}"></span></div>'
        f'<figcaption>asked: <span class="shows">{text(maps["shows"])}</span></figcaption></figure>'
    ]
    for layer, image in maps["maps"].items():
        low, high = maps["ranges"][layer]
        every = f' data-cosines="{text(maps["cosines"][layer])}"' if maps["cosines"] else ""
        figures.append(
            f'<figure><img src="{text(image)}" alt="cosines at layer {layer}"{every}><figcaption>layer {layer}'
            f"<small>{low:.2f} to {high:.2f}</small></figcaption></figure>"
        )
    return f'<div class="maps"{can_ask}>{"".join(figures)}</div>'


def _clouds(results: Results) -> str:
    figures = [
        f'<figure><img src="{text(image)}" alt="t-SNE of visual tokens at layer {layer}">'
        f"<figcaption>layer {layer}</figcaption></figure>"
        for layer, image in results["pictures"]["tsne"].items()
    ]
    colours = (
        "coloured by what the patch shows"
        if results["data"]["masks"]
        else "all grey, since these data have no masks that say what a patch shows"
    )
    told = f"Visual tokens of several images at unit length, {colours}; axes have no meaning."
    return f'<p>{told}</p><div class="clouds">{"".join(figures)}</div>' if figures else ""


# --- tables ---------------------------------------------------------------------------------------------------------


def _words(runs: Sequence[Results]) -> str:
    tables = []
    for run in runs:
        rows = "".join(
            f'<tr><td class="text">{text(json.dumps(word["text"], ensure_ascii=False))}</td>'
            f"<td>{percent(word['share'])}</td></tr>"
            for word in run["logit_lens"] or []
        )
        if rows:
            head = f"<thead><tr><th>{text(run['title'])}</th><th>share of visual tokens</th></tr></thead>"
            tables.append(f'<div class="block"><table class="words">{head}<tbody>{rows}</tbody></table></div>')
    return f'<div class="charts">{"".join(tables)}</div>' if tables else ""


def _table(run: Results) -> str:
    tasks = [task["name"] for task in run["data"]["probe_tasks"]]
    names = [title for _, title, _ in MEASURES] + [PROBES[task][0] for task in tasks]
    head = "".join(f"<th>{text(name)}</th>" for name in ["Layer", *names])
    rows = []
    for layer in run["layers"]:
        cells = [_number(layer.get(name)) for name, _, _ in MEASURES] + [
            _accuracy(layer["probe"].get(t)) for t in tasks
        ]
        rows.append(f'<tr><th scope="row">{layer["layer"]}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<h3>{text(run["title"])}</h3><div class="block wide-table"><table>{body}</table></div>'


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _accuracy(probe: dict[str, float] | None) -> str:
    if probe is None:
        return "-"
    return f"{percent(probe['accuracy'])} [{percent(probe['low'])}, {percent(probe['high'])}]"


def _provenance(run: Results) -> str:
    data = run["data"]
    facts = {
        "run": run["title"],
        **{name: str(value) for name, value in run["model"].items()},
        "data": _measured_on(run),
        "images with contrast": str(run["layers"][0]["images_with_contrast"]) if data["masks"] else "no masks",
    }
    rows = "".join(f'<tr><th scope="row">{text(k)}</th><td>{text(v)}</td></tr>' for k, v in facts.items())
    return f'<div class="block"><table class="facts"><tbody>{rows}</tbody></table></div>'
