"""A walk over a tar from header to header, independent of the index, and the comparison of the two.

``tarfile.open`` takes a corrupt header in the middle for the end of the archive and says nothing; this does.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.validate.findings import Finding
from data_prep.validate.members import is_stray_suffix

BLOCK = tarfile.BLOCKSIZE
ZEROS = bytes(BLOCK)
READ_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Member:
    """``offset`` and ``size`` of the content, in bytes."""

    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        return self.name.partition(".")[0]


@dataclass
class Walk:
    """``end``: up to where the members are known; ``finished``: that is the end of the archive."""

    members: list[Member] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    end: int = 0
    finished: bool = False


def walk(path: Path, shard: str) -> Walk:
    """Every member, and what is wrong with the tar itself; ``shard`` names it in findings.

    Raises:
        OSError: the file cannot be read.
    """
    found = Walk()
    total = path.stat().st_size

    def tell(reason: str, detail: str, name: str = "") -> None:
        found.findings.append(Finding(shard, name.partition(".")[0], reason, detail))

    with path.open("rb") as file:
        while True:
            file.seek(found.end)
            header = file.read(BLOCK)
            if len(header) < BLOCK:
                tell("tar_truncated", f"no end of the archive at byte {found.end + len(header)}")
                break
            if header == ZEROS:
                found.finished = True
                _check_end(file, tell)
                break
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError) as error:
                tell("tar_header", f"at byte {found.end}: {error}")
                break
            name = info.name.encode(errors="backslashreplace").decode()
            content = found.end + BLOCK
            if not info.isreg() or info.size < 0:
                tell("tar_header", f"at byte {found.end}: {name!r} is no plain file", name)
                break
            if content + info.size > total:
                tell("tar_truncated", f"ends inside {name!r}", name)
                break
            found.members.append(Member(name, content, info.size))
            found.end = content + -(-info.size // BLOCK) * BLOCK
    found.findings += _check_keys(shard, found.members)
    return found


def _check_end(file: BinaryIO, tell: Any) -> None:
    if file.read(BLOCK) != ZEROS:
        tell("tar_truncated", "the second of the two zero blocks at the end is missing")
        return
    while block := file.read(READ_AT_ONCE):
        if block.count(0) != len(block):
            tell("tar_trailing_data", f"data before byte {file.tell()}, after the end of the archive")
            return


def _check_keys(shard: str, members: list[Member]) -> list[Finding]:
    """A sample's members lie together, each once, and their names end as the format says."""
    findings, finished, names, current = [], set(), set(), ""
    for member in members:
        if member.key != current:
            finished.add(current)
            current = member.key
            if current in finished:
                findings.append(Finding(shard, current, "duplicate_key", f"again at byte {member.offset}"))
        elif member.name in names:
            findings.append(Finding(shard, current, "duplicate_key", f"{member.name!r} again at byte {member.offset}"))
        names.add(member.name)
        if is_stray_suffix(member.name.partition(".")[2]):
            findings.append(Finding(shard, current, "dot_in_key", f"{member.name!r} belongs to the key {current!r}"))
    return findings


def compare_with_index(shard: str, index: list[dict[str, Any]], found: Walk) -> list[Finding]:
    """One finding per key that differs; beyond where a broken tar could be walked nothing is compared."""
    listed = [
        Member(f"{entry['key']}.{extension}", *place)
        for entry in index
        for extension, place in entry["members"].items()
    ]
    if listed == found.members:
        return []
    in_tar = {member.name: member for member in found.members}
    in_index = {member.name: member for member in listed}
    wrong: dict[str, str] = {}
    for member in listed:
        there = in_tar.get(member.name)
        if there is None and (found.finished or member.offset < found.end):
            wrong.setdefault(member.key, f"the tar has no {member.name!r}")
        elif there is not None and there != member:
            wrong.setdefault(
                member.key,
                f"{member.name!r} lies at {there.offset} with {there.size} bytes, "
                f"in the index at {member.offset} with {member.size}",
            )
    for member in found.members:
        if member.name not in in_index:
            wrong.setdefault(member.key, f"the index does not list {member.name!r}")
    if not wrong and len(listed) == len(in_index):
        known = [member for member in listed if member.name in in_tar]
        pairs = zip(known, found.members, strict=False)
        displaced = next((here for here, there in pairs if here != there), None)
        if displaced is not None:
            return [Finding(shard, displaced.key, "index_order", f"the first one displaced is {displaced.name!r}")]
    elif not wrong:
        return [Finding(shard, "", "index_disagrees", "the index lists a member twice")]
    return [Finding(shard, key, "index_disagrees", detail) for key, detail in wrong.items()]
