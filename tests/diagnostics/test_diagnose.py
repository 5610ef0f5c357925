"""One tiny model diagnosed three ways gives the same numbers: as a Hugging Face directory, as a checkpoint, and as a
checkpoint laid out over ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_prep.emoji import prepare
from nemo_pre.data.conversation import TEMPLATES
from nemo_pre.diagnostics.results import REPORT, RESULTS
from nemo_pre.huggingface.exporter import export_checkpoint
from nemo_pre.huggingface.importer import import_checkpoint
from nemo_pre.huggingface.processor import jinja_template
from nemo_pre.verbs.diagnose import diagnose
from tests.cli.in_a_rank import command_line
from tests.data_prep.emoji_packages import write_all
from tests.diagnostics.diagnose_ranks import classes_of_stripes, diagnose_checkpoint, numbers
from tests.huggingface.test_logits import written
from tests.ranks import run_on_standing_ranks
from tests.report.test_page import Page

MODELS: dict[str, tuple[dict[str, Any], list[dict[str, int]]]] = {
    "causal": ({"language": "llama", "vision": "clip"}, [{}, {"pipeline": 2}, {"tensor": 2}, {"replicas": 3}]),
    "mixed": ({"language": "qwen2", "vision": "siglip", "spatial": ("mixed", "2d")}, [{"pipeline": 2}]),
}
CASES = [(name, layout) for name, (_, layouts) in MODELS.items() for layout in layouts]
CASES.sort(key=lambda case: math.prod(case[1].values()))  # ranks that stand take jobs of their number
SMALL = ["num_images=2", "num_fit=4", "batch_size=2", "platform=cpu"]
ASKED = {"num_images": 11, "num_fit": 24, "platform": "cpu"}


@pytest.fixture(scope="module")
def emoji(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "emoji"
    packages = str(write_all(tmp_path_factory.mktemp("packages")))
    prepare([packages], out, num_scenes=60, val_fraction=0.19, held_out_style="twitter", held_out_concepts=0.25)
    return out


@pytest.fixture(scope="module")
def diagnosed(tmp_path_factory, digits) -> Path:
    """By model: ``NAME/hf``, ``NAME/checkpoint``, and ``NAME/out``, the diagnosis of the directory."""
    root = tmp_path_factory.mktemp("diagnosed")
    for name, (options, _) in MODELS.items():
        original = written(root / name / "original", **options)
        # The prompts of the run's template, so that both sides are asked the same.
        (original / "chat_template.jinja").write_text(jinja_template(TEMPLATES["vicuna_v1"], tokenizer_adds_bos=False))
        import_checkpoint(str(original), str(root / name / "checkpoint"))
        export_checkpoint(str(root / name / "checkpoint"), str(root / name / "hf"))
        diagnose(str(root / name / "hf"), str(digits), str(root / name / "out"), batch_size=4, title=name, **ASKED)
    return root


def results(directory: Path) -> dict[str, Any]:
    return json.loads((directory / RESULTS).read_text())


@pytest.mark.parametrize("name, layout", CASES, ids=str)
def test_a_checkpoint_in_any_layout_has_the_numbers_of_the_exported_model(name, layout, diagnosed, digits, tmp_path):
    ranks = math.prod(layout.values())
    checkpoint = str(diagnosed / name / "checkpoint")
    asked = str(digits), str(tmp_path), layout, 3
    with_gradients = run_on_standing_ranks(diagnose_checkpoint, ranks, checkpoint, *asked)
    assert with_gradients == [0] * ranks
    expected, found = results(diagnosed / name / "out"), results(tmp_path)
    ours, theirs = numbers(found["layers"]), numbers(expected["layers"])
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    assert [word["token"] for word in found["logit_lens"]] == [word["token"] for word in expected["logit_lens"]]
    assert len(found["pictures"]["heat_maps"][0]["maps"]) == 5


def test_an_import_is_asked_and_diagnosed_on_the_command_line(diagnosed, digits, tmp_path):
    """Its configuration names no data, and passes the checks of a user's options all the same."""
    checkpoint, out = str(diagnosed / "causal" / "checkpoint"), str(tmp_path / "out")
    Image.new("RGB", (28, 28), "red").save(tmp_path / "x.png")
    asked = ["prompt=hello", f"image={tmp_path / 'x.png'}", "max_new_tokens=2", "chat_template=plain", "platform=cpu"]
    for words in (["generate", checkpoint, *asked], ["diagnose", checkpoint, str(digits), out, *SMALL]):
        code, said = command_line(words)
        assert code == 0, said
    assert len(results(Path(out))["layers"]) == len(results(diagnosed / "causal" / "out")["layers"])


def test_pictures_by_themselves_chosen_layers_and_plain_text_have_the_same_numbers_too(diagnosed, emoji, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All that is gold does not glitter. " * 40)
    asked = {"objects": True, "text": str(text)}
    hf, data = diagnosed / "causal" / "hf", str(emoji / "val_style")
    diagnose(str(hf), data, str(tmp_path / "hf"), batch_size=4, layers="0,2,4", **asked, **ASKED)
    checkpoint = str(diagnosed / "causal" / "checkpoint")
    more = {**asked, "layers": [0, 2, 4]}
    (tmp_path / "out").mkdir()
    out = str(tmp_path / "out")
    with_gradients = run_on_standing_ranks(diagnose_checkpoint, 1, checkpoint, data, out, {}, 3, more)
    assert with_gradients == [0], "what a gradient could flow through stays in memory: 14 GiB of SmolLM2's text"
    expected, found = results(tmp_path / "hf"), results(tmp_path / "out")
    assert [layer["layer"] for layer in found["layers"]] == [0, 2, 4]
    assert numbers(found["layers"]) == pytest.approx(numbers(expected["layers"]), rel=1e-4, abs=1e-4)
    assert found["layers"][1]["objects"]["objects"] >= 11 and found["layers"][1]["objects"]["place"]["asked"] >= 11
    assert found["text"]["tokens"] % 127 == 0
    assert found["text"]["loss"] == pytest.approx(expected["text"]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    "resize, rows",
    [
        ("whole", [[1, 2, 2, 3]] * 4),
        ("crop", [[2, 2, 2, 2]] * 4),
        ("pad", [[-1] * 4, [1, 2, 2, 3], [1, 2, 2, 3], [-1] * 4]),
    ],
)
def test_a_mask_is_cut_padded_and_resized_as_the_picture_is(resize, rows):
    assert run_on_standing_ranks(classes_of_stripes, 1, resize) == [rows]


def test_every_layer_has_every_measure(diagnosed):
    found = results(diagnosed / "causal" / "out")
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2, 3, 4]
    for layer in found["layers"]:
        assert -1 < layer["coupling"] < layer["cohesion"] < 1 or layer["layer"] > 0
        assert layer["contrast_difference"] == pytest.approx(layer["cohesion"] - layer["coupling"])
        assert 1 <= layer["effective_dimension"] <= 32 and 0 < layer["redundancy"] < 1
        assert set(layer["probe"]) == {"presence", "count"}
        by_head = layer["attention_to_visual_by_head"]
        assert (
            by_head is None if layer["layer"] == 0 else len(by_head) == 4 and all(0 < share < 1 for share in by_head)
        )
    assert found["layers"][0]["cka_to_layer_0"] == pytest.approx(1.0)
    assert found["layers"][0]["distance_to_layer_0"] == pytest.approx(0.0, abs=1e-6)
    assert found["layers"][1]["distance_to_layer_0"] > 1e-4
    assert all(layer["length"] > 0 for layer in found["layers"])
    assert sum(word["share"] for word in found["logit_lens"]) <= 1.0 + 1e-9


def test_the_report_is_one_page_with_the_curves_of_the_compared_runs(diagnosed, digits, tmp_path):
    hostile = "<script>alert(1)</script>"
    others = f"{diagnosed / 'causal' / 'out'},{diagnosed / 'mixed' / 'out' / RESULTS}"
    model = diagnosed / "causal" / "hf"
    diagnose(str(model), str(digits), str(tmp_path), num_images=2, num_fit=0, compare=others, title=hostile)
    page = Page((tmp_path / REPORT).read_text())
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]  # its own, by the policy's digest
    assert hostile in page.text and "causal" in page.text and "mixed" in page.text
    assert all(
        str(value).startswith("data:image/png") for _, attributes in page.tags if (value := attributes.get("src"))
    )
    for chart in ("Cohesion", "Effective dimension", "Redundancy", "Attention of text to visual tokens"):
        assert chart in page.charts()
    assert (
        "Linear probe for the number of objects, accuracy" in page.charts()
    )  # of the compared runs: this one has no probes
    assert "eq. 3" in page.text and "eq. 7" in page.text


@pytest.mark.parametrize(
    "options, told",
    [
        ({"num_images": 0}, "num_images=0"),
        ({"num_fit": 1}, "2 images or more"),
        ({"label": "species"}, "label=species is in no record"),
        ({"layers": "0,last"}, "layers=0,last: give numbers"),
        ({"layers": "9"}, "9 is not there, the model has 4 layers"),
        ({"text": "nowhere.txt"}, "text=nowhere.txt is no file"),
        ({"objects": True}, "objects=true needs scenes of named pictures"),
        ({"objects": True, "replicas": 2}, "objects=true takes one rank"),
        ({"compare": "nowhere.json"}, "nowhere.json is not a results.json"),
    ],
)
def test_wrong_options_are_one_sentence_each(options, told, diagnosed, digits, tmp_path):
    with pytest.raises(ValueError, match=told):
        diagnose(str(diagnosed / "causal" / "hf"), str(digits), str(tmp_path), **{**ASKED, **options})
