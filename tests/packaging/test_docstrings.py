"""Docstrings are whole sentences that name their subject: one can be read without the name above it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CLONE = Path(__file__).parents[2]
FRAGMENTS = (
    "Of|The same|By|For|From|On|At|In|As|To|With|Without|Per|Until|Before|After|Between|Behind|Beside|Rather|"
    "And|Also|Or|But|So|That|Likewise|Those|Its|Their|Args:|Raises:|Returns:|Attributes:"
)
FRAGMENT = re.compile(rf"({FRAGMENTS})(?![\w'])|\w+:$", re.MULTILINE)


def fragments(source: str) -> Iterator[tuple[int, str]]:
    """Line and first line of every docstring that begins in the middle of a sentence."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and (not text or FRAGMENT.match(text)):
                yield node.body[0].lineno, text.partition("\n")[0]


@pytest.mark.parametrize("room", ["nemo_pre", "data_prep", "benchmarks"])
def test_every_docstring_begins_with_its_subject(room):
    files = sorted((CLONE / room).rglob("*.py"))
    assert files
    found = [
        f"{file.relative_to(CLONE)}:{line}: {text}" for file in files for line, text in fragments(file.read_text())
    ]
    assert not found, "\n".join(["begin with the subject:", *found])


def test_a_fragment_is_found_wherever_it_stands():
    source = '"""From a to b."""\nclass A:\n  """Args:\n    x: y"""\n  def f():\n    """The same of b."""\n'
    assert [text for _, text in fragments(source)] == ["From a to b.", "Args:", "The same of b."]
    assert not list(fragments('"""Bytes of a."""\ndef f():\n  """Format of b."""\n  def g(): ...\n'))
