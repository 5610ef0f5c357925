"""npm packages of emoji, as the user has fetched them: a folder, or the archive that ``npm pack`` leaves.

Each draws the Unicode emoji in a style of its own. What is known of them:

- ``emoji-datasource-STYLE`` (google, twitter, ...): ``img/STYLE/64/CODES.png`` and ``emoji.json``, whose entries have
  names, categories and sub-categories;
- ``@lobehub/fluent-emoji-3d``: ``assets/CODES.webp``;
- ``openmoji``: ``color/svg/CODES.svg`` and ``data/openmoji.json``, whose annotations are CLDR's names.

CODES are code points in hexadecimal, joined by hyphens. Packages differ in letter case and in whether they write the
variation selector FE0F, which says that a picture is meant; :func:`code` leaves both out.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WANTED = re.compile(
    r"package\.json|emoji\.json|data/openmoji\.json|img/[\w-]+/64/[\w-]+\.png|assets/[\w-]+\.webp|color/svg/[\w-]+\.svg"
)
ARCHIVES = (".tgz", ".tar.gz")


@dataclass(frozen=True)
class Package:
    """``files``: bytes by path below the package, of those that matter here; ``path`` is where it was read from."""

    path: Path
    name: str
    version: str
    style: str
    pictures: dict[str, str]  # file by code
    files: dict[str, bytes] = field(repr=False)

    def json(self, file: str) -> Any:
        try:
            return json.loads(self.files[file])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}: {file} is not JSON ({error}); fetch the package again") from error

    def checksum(self) -> str:
        """The sha256 of all that was read of the package."""
        digest = hashlib.sha256()
        for name in sorted(self.files):
            digest.update(f"{name}\0{len(self.files[name])}\0".encode() + self.files[name])
        return digest.hexdigest()


@dataclass(frozen=True)
class Kind:
    """How a package's name tells its style, and where its pictures lie."""

    name: re.Pattern[str]
    style: Callable[[re.Match[str]], str]
    pictures: Callable[[str], re.Pattern[str]]


KINDS = (
    Kind(
        re.compile(r"emoji-datasource-([a-z][a-z0-9-]*)"),
        lambda match: match[1],
        lambda style: re.compile(rf"img/{re.escape(style)}/64/([\w-]+)\.png"),
    ),
    Kind(
        re.compile(r"@lobehub/fluent-emoji-3d"),
        lambda match: "fluent-3d",
        lambda style: re.compile(r"assets/([\w-]+)\.webp"),
    ),
    Kind(re.compile(r"openmoji"), lambda match: "openmoji", lambda style: re.compile(r"color/svg/([\w-]+)\.svg")),
)
KNOWN = "emoji-datasource-google (or -twitter), @lobehub/fluent-emoji-3d and openmoji"


def code(text: str) -> str:
    """``1F42D`` or ``1f441-fe0f`` as every package would have it: ``1f42d``, ``1f441``."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def read_packages(paths: Sequence[str | Path]) -> list[Package]:
    """The packages at ``paths``: archives, folders with a ``package.json``, or folders of these. In order of style.

    Raises:
        ValueError: one is not there, damaged, of an unknown name or without pictures, or two draw in one style.
    """
    found = [_read(place) for path in paths for place in _places(Path(path))]
    packages = sorted(found, key=lambda package: package.style)
    for one, other in zip(packages, packages[1:], strict=False):
        if one.style == other.style:
            raise ValueError(f"{one.path} and {other.path} are both of the style {one.style}; give one of them")
    return packages


def _places(path: Path) -> list[Path]:
    """The path itself where it is a package, or the packages right below it."""
    if path.is_file():
        if not path.name.endswith(ARCHIVES):
            raise ValueError(f"packages={path} is no archive of npm: give a .tgz file or a folder")
        return [path]
    if not path.is_dir():
        raise ValueError(f"packages={path} does not exist: fetch it with npm pack, and name the file or its folder")
    if _root(path) is not None:
        return [path]
    below = sorted(p for p in path.iterdir() if p.name.endswith(ARCHIVES) or (p.is_dir() and _root(p) is not None))
    if not below:
        raise ValueError(
            f"packages={path} has neither a package.json nor archives of npm: name a package or their folder"
        )
    return below


def _root(folder: Path) -> Path | None:
    """Where ``package.json`` lies: in the folder, or in ``package`` as archives have it."""
    return next((root for root in (folder, folder / "package") if (root / "package.json").is_file()), None)


def _read(path: Path) -> Package:
    files = dict(_of_archive(path) if path.is_file() else _of_folder(path))
    if "package.json" not in files:
        raise ValueError(f"{path} has no package.json: it is no package of npm")
    package = Package(path, "", "", "", {}, files)
    about = package.json("package.json")
    name, version = (about.get(key) if isinstance(about, dict) else None for key in ("name", "version"))
    if not isinstance(name, str) or not isinstance(version, str):
        raise ValueError(f"{path}: package.json has no name or no version; fetch the package again")
    for kind in KINDS:
        if (match := kind.name.fullmatch(name)) is not None:
            style = kind.style(match)
            return Package(path, name, version, style, _pictures(path, kind.pictures(style), files), files)
    raise ValueError(f"{path} is {name}, whose pictures are not known here: give {KNOWN}")


def _pictures(path: Path, pattern: re.Pattern[str], files: dict[str, bytes]) -> dict[str, str]:
    matches = [match for file in sorted(files) if (match := pattern.fullmatch(file)) is not None]
    if not matches:
        raise ValueError(f"{path} holds no pictures named like {pattern.pattern}; fetch the package again")
    return {code(match[1]): match[0] for match in matches}


def _of_archive(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = member.name.removeprefix("./").partition("/")[2]  # archives of npm have all in one folder
                if member.isfile() and WANTED.fullmatch(name):
                    content = archive.extractfile(member)
                    assert content is not None
                    yield name, content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an archive of npm ({error}); fetch it again") from error


def _of_folder(path: Path) -> Iterator[tuple[str, bytes]]:
    root = _root(path)
    assert root is not None
    for file in sorted(root.rglob("*")):
        name = file.relative_to(root).as_posix()
        if WANTED.fullmatch(name) and file.is_file():
            yield name, file.read_bytes()
