"""``docs/study.md``: the question, the table of claims, what has run and what has not, and the numbers behind."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_pre.report.intervals import Estimate
from nemo_pre.study.arms import Arm
from nemo_pre.study.claims import CLAIMS, LAVER, PRE, UNDECIDED, Claim
from nemo_pre.study.kept import Kept
from nemo_pre.study.page import markdown_table
from nemo_pre.study.real_figures import ANSWERS, LAYERS, PHASES_FIGURE, TRADE_OFF, answer_kinds, draw
from nemo_pre.study.real_summary import PHASES, Summary, between, over_seeds, summarise
from nemo_pre.study.runs import StudyRun
from nemo_pre.study.summary import SUMMARY, write_summary

REMARKS, AFTER = "remarks.md", "digits.md"  # beside the summary; taken up as they are
FIGURES = {"layers": LAYERS, "trade_off": TRADE_OFF, "answers": ANSWERS}
SHARES = ("exact_match", "concept", "category", "colour", "place", "says_name")
MEASURES = (
    ("concept", "probe: concept"),
    ("category", "probe: category"),
    ("colour", "probe: colour"),
    ("place", "probe: place"),
    ("coupling", "coupling"),
    ("contrast_difference", "cohesion - coupling"),
    ("pairwise_cosine", "cosine of two visual tokens"),
    ("effective_dimension", "effective dimension"),
    ("redundancy", "redundancy"),
    ("cka_to_layer_0", "CKA to the input"),
    ("distance_to_layer_0", "distance to the input"),
    ("attention_to_visual", "attention of text to the picture"),
    ("says_name", "logit lens: says the name"),
    ("says_name_among_10", "logit lens: name among 10"),
)
NORMS = ("grad_norm", "grad_norm/lm", "grad_norm/pre", "grad_norm/mim", "grad_norm/gram")


def write_real(
    arms: Sequence[Arm], runs: Sequence[StudyRun], settings: Mapping[str, Any], out: Path, page: Path, kept: Kept
) -> Summary:
    """The summary, the figures and the page of what is there and of what is kept; returns the summary."""
    summary = summarise(arms, runs, settings, kept)
    write_summary(summary, out)
    drawn = draw(summary, out)
    page.parent.mkdir(parents=True, exist_ok=True)
    beside = {name: _beside(out, name) for name in (REMARKS, AFTER)}
    page.write_text(render(summary, beside, os.path.relpath(out, page.parent), drawn), encoding="utf-8")
    return summary


def _beside(out: Path, name: str) -> str:
    file = out / name
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def render(summary: Summary, beside: Mapping[str, str], files: str, drawn: Sequence[str]) -> str:
    """Markdown; ``files``: where the figures are, seen from the page."""
    sections = [
        _intro(summary),
        _state(summary),
        f"## What it says together\n\n{beside[REMARKS]}" if beside.get(REMARKS) else "",
        _claims(summary, PRE, files, drawn),
        _claims(summary, LAVER, files, drawn),
        _figures(files, drawn),
        _phases(summary),
        _arms(summary),
        _gradients(summary),
        _method(summary, files),
        beside.get(AFTER, ""),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _intro(summary: Summary) -> str:
    return (
        "# Do visual tokens degrade in a language model that has read, and do PRe and LaVer help?\n\n"
        f"Written by `nemo-pre study real`; every number is in `{SUMMARY}`. Means over seeds with Student's 95% "
        "intervals; differences are paired by seed. A claim is *seen* where the interval of its number lies on the "
        "claimed side of 0, *not seen* where it holds 0, and *not decidable here* without an interval: fewer than two "
        "seeds have run. Of twenty such intervals one misses by chance."
    )


def _state(summary: Summary) -> str:
    labels: dict[str, list[str]] = {}
    for run in summary["runs"]:
        done = "done" if run["finished"] else f"{run['done']} of {run['steps']} steps" if run["done"] else "-"
        labels.setdefault(run["arm"], []).append(done)
    most = max(map(len, labels.values()), default=0)
    rows = [[_label(summary, arm), *seeds, *[""] * (most - len(seeds))] for arm, seeds in labels.items()]
    table = markdown_table(["arm", *(f"seed {number}" for number in range(1, most + 1))], rows)
    done = sum(run["finished"] for run in summary["runs"])
    told = f"{done} of {len(summary['runs'])} second stages are finished."
    if done < len(summary["runs"]):
        told += " The same command does the rest: what has not run is not concluded from."
    return f"## What has run\n\n{told}\n\n{table}"


def _label(summary: Summary, arm: str) -> str:
    return str(summary["labels"].get(arm, arm))


# --- claims ---------------------------------------------------------------------------------------------------------


def _claims(summary: Summary, paper: str, files: str, drawn: Sequence[str]) -> str:
    rows = [_claim(summary, claim, files, drawn) for claim in CLAIMS if claim.paper == paper]
    source = {PRE: "PRe (arXiv 2603.20808)", LAVER: "LaVer (arXiv 2512.06281)"}[paper]
    return f"## {source}\n\n{markdown_table(['claim', 'here', 'number', 'what it is', 'seeds', 'figure'], rows)}"


def _claim(summary: Summary, claim: Claim, files: str, drawn: Sequence[str]) -> list[str]:
    found = claim.estimate(summary)
    verdict = claim.verdict(summary)
    figure = FIGURES[claim.figure]
    number = _told(claim.metric, found, signed=True)
    seeds = str(found.n) if found else "0"
    link = f"[{claim.figure.replace('_', ' ')}]({files}/{figure})" if figure in drawn else "-"
    return [claim.said, verdict if verdict == UNDECIDED else f"**{verdict}**", number, claim.measured, seeds, link]


def _told(metric: str, estimate: Estimate | None, signed: bool = False) -> str:
    if estimate is None:
        return "-"
    plus = "+" if signed else ""
    ends = [end for end in (estimate.low, estimate.high) if end is not None]
    if metric.startswith(SHARES):
        value, *limits = (f"{100 * number:{plus}.1f}" for number in (estimate.value, *ends))
        value += "%"
    else:
        value, *limits = (f"{number:{plus}.3g}" for number in (estimate.value, *ends))
    return f"{value} [{', '.join(limits)}]" if limits else value


# --- numbers --------------------------------------------------------------------------------------------------------


def _figures(files: str, drawn: Sequence[str]) -> str:
    told = {
        PHASES_FIGURE: "The baseline, layer by layer, from before the first stage to the end of the second",
        LAYERS: "All arms at the end, layer by layer",
        TRADE_OFF: "Answers against what the middle still holds, along the second stage",
        ANSWERS: "Answers by type of question",
    }
    shown = [f"{text}.\n\n![{text}]({files}/{name})" for name, text in told.items() if name in drawn]
    return "## Figures\n\n" + "\n\n".join(shown) if shown else ""


def _phases(summary: Summary) -> str:
    """The baseline, and the random control at its end: measures at each depth."""
    depths = list(summary["settings"]["layers"])
    header = ["measure", "when", *(depth.replace("_", " ") for depth in depths)]
    rows = []
    for name, title in MEASURES:
        for arm, phase in (*(("baseline", phase) for phase in PHASES), ("random", "end")):
            cells = [over_seeds(summary, arm, f"{name}@{depth} {phase}") for depth in depths]
            if any(cells):
                when = phase if arm == "baseline" else f"{phase}, random language model"
                rows.append([title, when, *(_told(name, cell) for cell in cells)])
    if not rows:
        return ""
    told = "`start`: a new projector before the first stage; `aligned`: after it; 1/4, 1/2 and end of the second."
    return f"## The baseline along training\n\n{told}\n\n{markdown_table(header, rows)}\n\n{_said(summary)}".rstrip()


def _said(summary: Summary) -> str:
    """What visual tokens of the last layer would say."""
    arm = summary["arms"].get("baseline")
    if arm is None:
        return ""
    first = next(iter(arm["seeds"].values()))["phases"]
    told = []
    for phase in PHASES:
        words = first.get(phase, {}).get("says", [])
        if words:
            told.append(
                f"{phase}: " + ", ".join(f"`{word.strip() or repr(word)}` {share:.0%}" for word, share in words)
            )
    return "The most frequent words at visual tokens of the last layer, seed 1. " + "; ".join(told) + "."


def _arms(summary: Summary) -> str:
    kinds = answer_kinds(summary)
    columns = [*kinds, "lm_loss", "text_loss change", "concept@middle", "concept@last", "contrast_difference@middle"]
    if not kinds:
        return ""
    header = ["arm", "seeds", *(_column(name) for name in columns)]
    blind = summary["settings"]["most_frequent"]
    rows = [
        ["always the most frequent answer", "", *(f"{blind[name]:.1%}" if name in blind else "-" for name in columns)]
    ]
    for name, arm in summary["arms"].items():
        cells = [_told(column, over_seeds(summary, name, column)) for column in columns]
        if any(cell != "-" for cell in cells):
            rows.append([arm["label"], str(len(arm["seeds"])), *cells])
            for other in arm["against"]:
                less = [_told(column, between(summary, name, other, column), signed=True) for column in columns]
                if any(cell != "-" for cell in less):
                    rows.append([f"less {_label(summary, other)}", "", *less])
    larger = ""
    if "exact_match/larger" in kinds:
        larger = "Of `larger` one of the two names in the question is right half of the time. "
    return (
        f"## All arms at the end\n\n{markdown_table(header, rows)}\n\n"
        f"{larger}Losses are in nats a token: of "
        "the validation answers, and on plain text less what it was before the first stage, which is what was "
        "forgotten."
    )


def _column(name: str) -> str:
    kind = name.removeprefix("exact_match").lstrip("/")
    if name.startswith("exact_match"):
        return kind or "exact match"
    words = {"lm_loss": "loss of answers", "text_loss change": "loss on text, less before"}
    if name in words:
        return words[name]
    measure, _, depth = name.partition("@")
    return f"{dict(MEASURES)[measure]}, {depth}"


def _gradients(summary: Summary) -> str:
    rows = []
    names = [name for name in NORMS if any(name in of["training"] for of in _all_seeds(summary))]
    for arm in summary["arms"].values():
        seeds = [of["training"] for of in arm["seeds"].values() if of["training"]]
        if seeds:
            cells = [[of[name] for of in seeds if name in of] for name in names]
            rows.append([arm["label"], *(f"{sum(of) / len(of):.3g}" if of else "-" for of in cells)])
    if not rows:
        return ""
    header = ["arm", *(name.replace("grad_norm/", "of ").replace("grad_norm", "all") for name in names)]
    return (
        "## Gradient norms\n\nMedians of the last recorded steps, before clipping at 1; means over seeds.\n\n"
        f"{markdown_table(header, rows)}"
    )


def _all_seeds(summary: Summary) -> list[dict[str, Any]]:
    return [seed for arm in summary["arms"].values() for seed in arm["seeds"].values()]


def _method(summary: Summary, files: str) -> str:
    settings = summary["settings"]
    encoder = settings["encoder"]
    seen = ""
    if encoder:
        named = "; ".join(
            f"{split}: " + ", ".join(f"{name} {value:.1%}" for name, value in found.items())
            for split, found in encoder["accuracy"].items()
        )
        seen = (
            f"The encoder ({encoder['vision']['num_layers']} layers of {encoder['vision']['hidden_size']}, "
            f"{(encoder['vision']['image_size'] // encoder['vision']['patch_size']) ** 2} visual tokens) learned for "
            f"{encoder['steps']} steps of {encoder['batch']} scenes to name {encoder['concepts']:,} concepts, and was "
            f"frozen. Pictures named right by it alone: {named}. "
        )
    depths = ", ".join(f"{name.replace('_', ' ')} {layer}" for name, layer in settings["layers"].items())
    hours = sum(of["seconds"] or 0 for of in _all_seeds(summary)) / 3600
    return (
        f"## How it was done\n\n{seen}Stage 1 trains the projector for {settings['first_steps']} steps of "
        f"{settings['rows']} rows of {settings['row_length']} tokens, each packed with about three scenes, stage "
        f"2 projector and language model for {settings['steps']}, in "
        f"{settings['precision']}, from the first stage of its seed and on other scenes. Layers: {depths}. Probes are "
        f"linear, fitted on the pictures in {settings['num_fit']} scenes of the training styles and tested on those "
        f"in {settings['num_images']} of the style held out; {settings['val_samples']} validation questions are "
        f"answered. Second stages took {hours:.1f} hours, each since it was last started. Options of all runs: "
        f"{', '.join(settings['options']) or 'none'}. "
        f"Every number of every run: [{SUMMARY}]({files}/{SUMMARY}).\n\n{_commands(settings)}"
    )


def _commands(settings: Mapping[str, Any]) -> str:
    """What makes the page again, every setting written out."""
    of_data = {name: value for name, value in settings["data"].items() if name != "packages" and value is not None}
    named = ("first_steps", "steps", "rows", "num_images", "num_fit", "val_samples", "precision", "text")
    taught = (settings["encoder"] or {}).get(
        "steps", settings["encoder_steps"]
    )  # one that was there is taken as it is
    given = [f"encoder_steps={taught}", *(f"{n}={settings[n]}" for n in named if settings.get(n) is not None)]
    study = " ".join(["nemo-pre study real", *given, *settings["options"]])
    data = " ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in of_data.items()
    )
    lines = (
        f"nemo-pre data emoji PACKAGES out=data/emoji {data}",
        "nemo-pre smollm2 out=checkpoints/smollm2",
        f"{study}   # goes on where it was; most_runs=0 writes this page anew",
    )
    return "\n".join(f"    {line}" for line in lines)
