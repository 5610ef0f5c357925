"""The HTML report: well formed, self-contained, escaped, and with each figure that the run has."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nemo_pre.report.page import render, report
from nemo_pre.report.provenance import provenance
from nemo_pre.report.runs import read_run
from nemo_pre.report.samples import SampleAnswer
from tests.report.recorded import record_run

VOID = {"meta", "img", "br", "link", "input"}
HOSTILE = "<script>alert('x')</script> & \"<b>run</b>\""


class Page(HTMLParser):
    """Fails on tags that are not closed in order; keeps tags, attributes and visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def charts(self) -> list[str]:
        labels = [attributes.get("aria-label") for tag, attributes in self.tags if tag == "svg"]
        return [label.split(":")[0] for label in labels if label]


def full_run(directory: Path, **options: object) -> Path:
    records: dict[int, dict[str, float]] = {}
    for step in range(1, 121):
        records[step] = {"lm/loss": 2 * math.exp(-step / 40) + 0.1 * math.sin(step), "lr": 1e-4, "grad_norm": 1.0}
        records[step] |= {"pre/cosine": 1 - 1 / step, "laver/mim": 3.0, "laver/gram": 1e-5, "laver/similarity": 0.4}
        records[step] |= {f"similarity/layer_{layer}": 0.1 * layer for layer in range(3)}
        if step % 60 == 0:
            records[step] |= {"val/lm_loss": 0.5, "val/exact_match": 0.25, "val/answers": 8.0}
            records[step] |= {"val/exact_match/count": 0.5, "val/answers/count": 4.0}
            records[step] |= {"val/exact_match/read": 0.0, "val/answers/read": 4.0}
    return record_run(directory, records, **options)


def picture() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (48, 40), "navy").save(file, "PNG")
    return file.getvalue()


def test_the_page_is_well_formed_and_needs_nothing_else(tmp_path: Path) -> None:
    html = report(str(full_run(tmp_path / "run")), out=str(tmp_path / "sub" / "report.html")).read_text()
    page = Page(html)
    assert page.tags[0][0] == "html"
    sources = [
        value
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href")
    ]
    assert all(source and source.startswith("data:") for source in sources)
    assert not {"script", "link", "iframe", "object", "a"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|url\(|@import", html)


def test_each_figure_of_the_run_is_there_once(tmp_path: Path) -> None:
    page = Page(report(str(full_run(tmp_path / "run")), out=str(tmp_path / "report.html")).read_text())
    assert page.charts() == [
        "Language-model loss (nats per token)",
        "Gradient norm",
        "Learning rate",
        "PRe",
        "LaVer",
        "LaVer",
        "LaVer",
        "Mean cosine of an image's visual tokens",
        *("all", "count", "read"),
        *("all questions", "count", "read"),
    ]
    for content in ("120", "0.5", "25.0%", "of 8 (7.1% to 59.1%)", "50.0%", "15.0% to 85.0%", "step 120"):
        assert content in page.text


def test_a_curve_runs_where_its_values_are(tmp_path: Path) -> None:
    values = {step: {"lm/loss": math.nan if 5 <= step <= 6 else float(step)} for step in range(1, 11)}
    html = report(str(record_run(tmp_path / "run", values)), out=str(tmp_path / "report.html")).read_text()
    (path,) = (shape["d"] for tag, shape in Page(html).tags if (tag, shape.get("class")) == ("path", "line line0"))
    assert path is not None
    pieces = [[tuple(map(float, point.split())) for point in piece.split("L")] for piece in path.split("M")[1:]]
    assert [len(piece) for piece in pieces] == [4, 4]  # a gap where the loss is not finite
    x, y = zip(*pieces[0], strict=True)
    assert x == pytest.approx([46 + step / 10 * 326 for step in (1, 2, 3, 4)], abs=0.1)
    assert y[0] - y[1] == pytest.approx(y[2] - y[3], abs=0.11) and y[0] > y[1]
    assert "lm/loss is not finite in 2 of 10 records, first at step 5" in Page(html).text


def test_a_hostile_name_stays_text(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", name=HOSTILE, experiment=HOSTILE, init_from=HOSTILE)
    rows = [SampleAnswer(HOSTILE, picture(), HOSTILE, HOSTILE, "\x00" + HOSTILE, HOSTILE)]
    read = read_run(run)
    read.series[f"val/exact_match/{HOSTILE}"] = {120: 0.5}
    html = render(read, rows, provenance(read, HOSTILE, HOSTILE))
    page = Page(html)
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert "\x00" not in html
    assert page.text.count(HOSTILE) >= 8


def test_right_and_wrong_answers_are_told_in_words(tmp_path: Path) -> None:
    rows = [
        SampleAnswer("a", picture(), "how many?", "Three", "three.", "count"),
        SampleAnswer("b", picture(), "which?", "7", "", "read"),
    ]
    page = Page(render(read_run(full_run(tmp_path / "run")), rows, {}))
    assert "count ✓ right question how many? expected Three answer three." in page.text
    assert "read ✗ wrong question which? expected 7 answer nothing" in page.text
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [(image["width"], image["height"], image["alt"]) for image in pictures] == [
        ("48", "40", "a"),
        ("48", "40", "b"),
    ]
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in pictures)


def test_a_run_without_validation_samples_config_or_regularizers_has_a_report(tmp_path: Path) -> None:
    run = record_run(tmp_path / "bare", {5: {"lm/loss": 1.5}}, seed=None)
    page = Page(report(str(run), out=str(tmp_path / "report.html")).read_text())
    assert "recorded no validation" in page.text and "No model was asked" in page.text
    assert "There is no config.yaml" in page.text and "Regularizers" not in page.text
    assert page.charts() == ["Language-model loss (nats per token)"]


def test_a_cut_record_is_said_and_reported_to_its_last_whole_line(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", trainer__max_steps=500)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 140, "lm/loss"')
    page = Page(report(str(run), out=str(tmp_path / "report.html")).read_text())
    assert "1 torn line(s)" in page.text and "stopped at step 120 of 500" in page.text


def test_the_data_and_the_config_are_shown(tmp_path: Path, digits: Path) -> None:
    from nemo_pre.data.manifest import read_manifest

    run = full_run(tmp_path / "run", data__path=str(digits), optim__lr=0.00123)
    page = Page(report(str(run), out=str(tmp_path / "report.html")).read_text())
    assert read_manifest(digits).fingerprint in page.text and "320 train, 80 val samples" in page.text
    assert "lr: 0.00123" in page.text
    assert [tag for tag, attributes in page.tags if tag == "details" and "open" not in attributes] == ["details"]


def test_answers_of_an_exported_model_stand_in_the_report(tmp_path: Path, digits: Path) -> None:
    from tests.huggingface.tiny import tiny_llava

    run = full_run(tmp_path / "run", data__path=str(digits))
    model = tiny_llava(tmp_path / "model")
    html = report(str(run), out=str(tmp_path / "report.html"), model=str(model), num_samples=2).read_text()
    page = Page(html)
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 2
    assert "The first 2 validation pictures" in page.text and str(model) in page.text


def test_wrong_input_is_named(tmp_path: Path) -> None:
    bare = record_run(tmp_path / "bare", {5: {"lm/loss": 1.5}}, seed=None)
    with pytest.raises(ValueError, match="does not tell where its data are"):
        report(str(bare), model="model", out=str(tmp_path / "report.html"))
    with pytest.raises(ValueError, match="num_samples=-1"):
        report(str(bare), num_samples=-1, out=str(tmp_path / "report.html"))
    with pytest.raises(ValueError, match="no metrics.jsonl"):
        report(str(tmp_path), out=str(tmp_path / "report.html"))
