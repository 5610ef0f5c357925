"""What an option may hold is said at its field alone; a table by the same words has exactly these keys."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_pre.config.help import parts
from nemo_pre.config.schema import DataConfig, LanguageConfig, VisionConfig
from nemo_pre.options import RULE, choices_of

PACKAGE = Path(__file__).parents[2] / "nemo_pre"


def word_lists(source: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and words of every tuple, list or set of at least two texts in a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Tuple | ast.List | ast.Set) and len(node.elts) > 1:
            words = [
                each.value for each in node.elts if isinstance(each, ast.Constant) and isinstance(each.value, str)
            ]
            if len(words) == len(node.elts):
                yield node.lineno, tuple(words)


def test_no_module_lists_the_choices_of_an_option_again():
    choices = {
        frozenset(field.metadata[RULE].choices): f"{part}.{field.name}"
        for part, owner in parts().items()
        for field in dataclasses.fields(owner)
        if RULE in field.metadata and field.metadata[RULE].choices
    }
    assert len(choices) > 20
    fields = ("config/schema.py", "config/run.py", "objectives/*/__init__.py")  # where choices are said
    travelling = ("huggingface/remote_code/*.py",)  # goes with exported models, without this package
    found = [
        f"{file.relative_to(PACKAGE)}:{line}: the choices of {choices[frozenset(words)]}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if not any(file.relative_to(PACKAGE).match(pattern) for pattern in (*fields, *travelling))
        for line, words in word_lists(file.read_text())
        if frozenset(words) in choices
    ]
    assert not found, "\n".join(["ask nemo_pre.options.choices_of:", *found])


def test_every_chat_template_is_written():
    from nemo_pre.data.conversation import TEMPLATES

    assert tuple(TEMPLATES) == choices_of(DataConfig, "chat_template")


def test_every_image_filter_has_pillows_number():
    from PIL import Image

    from nemo_pre.huggingface.processor import RESAMPLE

    assert set(RESAMPLE) == set(choices_of(DataConfig, "image_filter"))
    assert {name: Image.Resampling[name.upper()].value for name in RESAMPLE} == RESAMPLE


def test_every_family_of_towers_and_of_language_models_is_described():
    from nemo_pre.config.vision_families import FAMILIES
    from nemo_pre.huggingface.architecture import LANGUAGE_FAMILIES

    assert tuple(FAMILIES) == choices_of(VisionConfig, "family")
    assert set(LANGUAGE_FAMILIES.values()) == set(choices_of(LanguageConfig, "family"))


@pytest.mark.parametrize("resize", choices_of(DataConfig, "image_resize"))
@pytest.mark.parametrize("image_filter", choices_of(DataConfig, "image_filter"))
def test_every_way_to_resize_gives_a_square(resize, image_filter):
    import io

    from PIL import Image

    from nemo_pre.data.images import image_tensor

    picture = io.BytesIO()
    Image.new("RGB", (30, 20), (200, 10, 10)).save(picture, "PNG")
    pixels = image_tensor(picture.getvalue(), 14, [0.5] * 3, [0.5] * 3, "a sample", resize, image_filter)
    assert pixels.shape == (3, 14, 14)
