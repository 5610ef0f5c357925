"""What a user or another program wrote as JSON is read with one discipline: file, line and field are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_pre.data.features import read_features
from nemo_pre.data.manifest import read_manifest
from nemo_pre.diagnostics.results import read_results
from nemo_pre.evaluation.watch import evaluated_steps
from nemo_pre.inference import read_requests
from nemo_pre.planner.step_time import _step_times
from nemo_pre.run_files.checkpoints import damage_of
from nemo_pre.run_files.saved_config import read_saved
from nemo_pre.run_files.skipped_samples import read_skipped
from nemo_pre.scaling.grid import read_grid


def written(tmp_path: Path, *lines: Any) -> Path:
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return file


def test_requests_end_at_line_feeds_alone_and_blank_lines_are_passed_over(tmp_path):
    """Python counts eight further characters as ends of lines, which JSON allows in texts."""
    text = "a\u2028b\u2029c\x85d\x1ce\x0bf"
    lines = [json.dumps({"prompt": "a\u2028b\u2029c\x85d"}, ensure_ascii=False), "", "  ", "\ufeff".strip("\ufeff")]
    file = written(tmp_path, *lines, {"prompt": text, "images": ["x=1, y.png"]}, "")
    assert read_requests(file) == [
        ("a\u2028b\u2029c\x85d", []),
        (text, [str(tmp_path / "x=1, y.png")]),
    ]
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "with a mark"}\r\n')
    assert read_requests(file) == [("with a mark", [])]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ({"prompt": "x", "image": ["y"]}, "line 2: there is no field 'image', the nearest is 'images'."),
        ({"prompt": "x", "temperature": 1}, "line 2: there is no field 'temperature', known are prompt, images."),
        ({"images": []}, "line 2: the field 'prompt' is missing."),
        ({"prompt": 3}, "line 2: 'prompt' is 3, where a text is expected."),
        ({"prompt": None}, "line 2: 'prompt' is null, where a text is expected."),
        ({"prompt": ["x"]}, "line 2: 'prompt' is [\"x\"], where a text is expected."),
        ({"prompt": "x", "images": "y.png"}, "line 2: 'images' is \"y.png\", where a list is expected."),
        ({"prompt": "x", "images": None}, "line 2: 'images' is null, where a list is expected."),
        ({"prompt": "x", "images": ["y", 3]}, "line 2: image 2 is 3, where a text is expected."),
        ({"prompt": "x", "images": [{"a": "b" * 99}]}, 'line 2: image 1 is {"a": "bbb'),
        ([1], "line 2 is [1], where an object is expected."),
        ("{", "line 2 is no JSON (Expecting property name enclosed in double quotes): mend it."),
        ("[" * 100_000, "line 2 is no JSON (it is nested too deep): mend it."),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_a_wrong_request_is_refused_with_file_line_and_field(line, sentence, tmp_path):
    file = written(tmp_path, {"prompt": "right"}, line)
    with pytest.raises(ValueError) as refusal:
        read_requests(file)
    assert str(refusal.value).startswith(f"{file}, {sentence}")


def test_requests_that_cannot_be_read_or_are_none_are_refused(tmp_path):
    for content, words in ((b"", "holds no request"), (b"\n \n", "holds no request"), (b"\xff\xfe{", "no UTF-8 text")):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read_requests(tmp_path / "x")
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            read_requests(path)


GARBAGE = (
    b"",
    b"\xff\xfe\x00",
    b"null",
    b"[]",
    b"3",
    b'"x"',
    b"{}",
    b"{",
    b"[" * 100_000,
    b'{"format": 3}',
    b"[1, 2]",
)


def _saved(path: Path) -> Any:
    return read_saved(path.parent).model.vision.family


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a manifest of data": ("manifest.json", lambda file: read_manifest(file.parent)),
    "a manifest of features": ("features.json", lambda file: read_features(file.parent)),
    "results of a diagnosis": ("results.json", read_results),
    "evaluations of a run": ("evaluations.jsonl", lambda file: evaluated_steps(file.parent)),
    "metrics to calibrate by": ("metrics.jsonl", _step_times),
    "sizes of a checkpoint": ("sizes.json", lambda file: damage_of(file.parent)),
    "skipped samples": ("skipped_samples.jsonl", lambda file: read_skipped(str(file.parent))),
    "a grid": ("grid.yaml", read_grid),
    "the configuration of a checkpoint": ("config.yaml", _saved),
}


def refusal_of(read: Callable[[Path], Any], file: Path) -> str | None:
    try:
        read(file)
    except ValueError as refusal:
        return str(refusal)
    return None


@pytest.mark.parametrize("what", READERS)
@pytest.mark.parametrize("content", GARBAGE, ids=lambda content: repr(content[:12]))
def test_a_damaged_file_is_a_sentence_that_names_it(what, content, tmp_path):
    """Or has nothing in it, where a run that was killed may leave it so."""
    name, read = READERS[what]
    file = tmp_path / name
    file.write_bytes(content)
    sentence = refusal_of(read, file)
    assert sentence is None or (str(tmp_path) in sentence and len(sentence) < 1000)
