"""The pictures of a scene, each by itself: which tokens show it, what is read off them, what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from data_prep.emoji import prepare
from nemo_pre.diagnostics.objects import Names, ObjectClasses, ObjectMeasures, ObjectsOfBatch, SceneObject, coverage
from nemo_pre.diagnostics.probe import LinearProbe, ProbeScore
from nemo_pre.diagnostics.samples import DiagnosticSample, read_data
from nemo_pre.diagnostics.states import Grid, VisualStates
from tests.data_prep.emoji_packages import write_all

PATCHES = torch.tensor([[1, 1, 0, 0], [1, 2, 2, 2], [0, 0, 0, 0], [0, 2, 0, 0]])  # a grid of 2 x 2, four pixels each


@pytest.fixture(scope="module")
def emoji(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "emoji"
    packages = str(write_all(tmp_path_factory.mktemp("packages")))
    prepare([packages], out, num_scenes=60, held_out_style="twitter", held_out_concepts=0.25)
    return out


def test_an_object_lies_where_its_pixels_do():
    expected = torch.tensor([[2 / 3, 1 / 3, 0, 0], [0, 0.75, 0, 0.25], [0, 0, 0, 0]])
    torch.testing.assert_close(coverage(PATCHES, [1, 2, 3]), expected)


def batch() -> tuple[list[DiagnosticSample], VisualStates]:
    """Two pictures of a thumbnail's four tokens behind one more; the second shows nothing that has a name."""
    objects = (
        SceneObject(1, "cat", torch.tensor([1.0, 0, 1, 0])),
        SceneObject(2, "dog", torch.tensor([0, 1.0, 0, 0])),
    )
    plain = DiagnosticSample("0", Image.new("RGB", (4, 4)), "", None, torch.zeros(0))
    states = VisualStates(
        torch.tensor([0] * 5 + [1] * 5),
        [Grid(1, 2, 2)] * 2,
        None,
        torch.arange(20.0).view(10, 2),
        instances=[PATCHES] * 2,
    )
    return [replace(plain, objects=objects), plain], states


def test_its_mean_weighs_tokens_by_how_much_of_it_they_show():
    objects = ObjectsOfBatch.of(*batch())
    tokens = torch.arange(20.0).view(10, 2)
    assert objects.names == ["cat", "dog"] and objects.picture.tolist() == [0, 0]
    expected = [(2 * tokens[1] + tokens[2]) / 3, (3 * tokens[2] + tokens[4]) / 4]
    torch.testing.assert_close(objects.means(tokens), torch.stack(expected).double())
    assert torch.equal(objects.shown_most(tokens), tokens[[1, 2]])


def test_probes_count_what_the_records_tell_and_the_lens_counts_names_however_they_begin():
    words = {"cat": [7], " cat": [1], "Cat": [2], " Cat": [3], "dog": [4], " dog": [4], "Dog": [4], " Dog": [4]}
    names = Names(SimpleNamespace(token_ids=words.__getitem__))  # type: ignore[arg-type]
    assert names.first_tokens("cat") == [1, 2, 3, 7]
    tasks = ObjectClasses({"concept": ["cat", "dog"], "colour": ["red", "blue"]}).tasks
    weights = torch.zeros(2, 4, dtype=torch.float64)
    says_cat_and_red = LinearProbe(tasks, weights, torch.zeros(2), torch.tensor([1.0, 0, 1, 0]).double(), [1.0, 1.0])
    measures = ObjectMeasures(ProbeScore(says_cat_and_red))
    scores = torch.zeros(2, 30)
    scores[0, 3], scores[1, 8], scores[1, 4] = 9.0, 9.0, 5.0
    measures.update(torch.zeros(10, 2), ObjectsOfBatch.of(*batch()), names, scores)
    found = measures.result()
    assert (found["concept"]["accuracy"], found["concept"]["asked"]) == (0.5, 2)
    assert (found["colour"]["accuracy"], found["colour"]["asked"]) == (1.0, 1)  # the dog's colour is not told
    assert found["says_name"] == 0.5 and found["says_name_among_10"] == 1.0


def test_scenes_tell_their_pictures_and_classes_come_from_the_fit_set(emoji):
    data = read_data(emoji / "val_style", num_fit=30, num_test=3, objects=True)
    assert data.objects is not None
    sample = next(data.test_samples())
    record = data.val.read(data.test[0]).record["scene"]["pictures"]
    assert [each.name for each in sample.objects] == [placed["name"] for placed in record]
    sizes = [task.size for task in data.objects.tasks]
    for each, placed in zip(sample.objects, record, strict=True):
        concept, _, colour, place = each.truth.split(sizes)
        known = placed["name"] in data.objects.classes["concept"]
        assert float(concept.sum()) == known
        assert data.objects.classes["place"][int(place.argmax())] == placed["place"] or not place.any()
        assert colour.any() == (placed["colour"] in data.objects.classes["colour"])
    assert sample.instances is not None and sample.marked_mask is not None
    assert sample.marked_mask.getchannel(2).tobytes() == sample.instances.tobytes()


def test_data_without_named_pictures_are_refused(digits):
    with pytest.raises(ValueError, match="objects=true needs scenes of named pictures to fit on"):
        read_data(digits, num_fit=10, num_test=3, objects=True)
