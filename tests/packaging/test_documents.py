"""The documents that a public project is read by: their links lead somewhere, and they agree with the package."""

import re
from pathlib import Path

import pytest
import yaml

import recipes
from nemo_pre import __version__

CLONE = Path(__file__).parents[2]
PAGES = [
    CLONE / "README.md",
    CLONE / "CONTRIBUTING.md",
    CLONE / "slurm/README.md",
    *sorted((CLONE / "docs").glob("*.md")),
]


def anchors(page: Path) -> set[str]:
    """The names that a page's headings have as link targets."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CLONE)))
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CLONE)))
def test_every_recipe_that_a_page_runs_exists(page):
    own = {"mine", "mysite", "mine_siglip2_qwen25_7b"}  # examples, which test_own_recipes composes
    text = page.read_text().replace("${M}", "siglip2_qwen25_7b_laver")
    for group in recipes.groups():
        for name in re.findall(rf"(?<![\w./]){group}=([a-z][\w/-]*)", text):
            assert name in {*recipes.choices(group), *own}, f"{group}={name}"
    for chain in re.findall(r"chain=\[([a-z][^\]]*)\]", text):
        assert {*chain.split(",")} <= {*recipes.choices("experiment"), "export", "evaluate"}, chain


def test_the_table_of_contents_names_every_page():
    contents = (CLONE / "docs/index.md").read_text()
    for page in (CLONE / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in contents, page.name


def test_the_citation_is_of_this_version_and_of_both_papers():
    citation = yaml.safe_load((CLONE / "CITATION.cff").read_text())
    assert (str(citation["version"]), citation["license"]) == (__version__, "Apache-2.0")
    assert [paper["identifiers"][0]["value"] for paper in citation["references"]] == [
        "arXiv:2603.20808",
        "arXiv:2512.06281",
    ]
    assert all(author["family-names"] for paper in citation["references"] for author in paper["authors"])


def test_the_readme_is_a_first_read_with_the_commands_that_run_here():
    lines = (CLONE / "README.md").read_text().splitlines()
    makefile = (CLONE / "Makefile").read_text()
    targets = [line.split()[1] for line in lines if line.startswith("    make ")]
    assert targets == ["demo", "test"] and all(f"\n{target}:" in makefile for target in targets)
    assert len(lines) <= 150
