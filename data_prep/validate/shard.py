"""The shard as a whole: its files, their checksums, its tar and its index."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.validate.findings import Finding
from data_prep.validate.tar import READ_AT_ONCE, compare_with_index, walk
from nemo_pre.data.manifest import Shard


@dataclass(frozen=True)
class ShardJob:
    """``entry``: the shard's entry in the manifest, as it stands there."""

    name: str
    shard: Shard
    entry: dict[str, Any]
    checksums: bool


def check_shard(job: ShardJob) -> list[Finding]:
    shard, name = job.shard, job.name
    findings = []
    for kind, path, size in (("", shard.path, shard.bytes), ("index_", shard.index_path, shard.index_bytes)):
        findings += _check_file(name, path, size, job.entry.get(f"{kind}sha256"), job.checksums)
    if any(finding.reason == "missing_file" for finding in findings):
        return findings
    try:
        found = walk(shard.path, name)
    except OSError as error:
        return [*findings, Finding(name, "", "missing_file", f"cannot be read: {error.strerror}")]
    findings += found.findings
    try:
        index = read_index(shard.index_path)
    except ValueError as error:
        return [*findings, Finding(name, "", "index_unreadable", str(error))]
    if len(index) != shard.samples:
        detail = f"it lists {len(index)} samples, the manifest {shard.samples}"
        findings.append(Finding(name, "", "index_unreadable", detail))
    return findings + compare_with_index(name, index, found)


def _check_file(name: str, path: Path, size: int, checksum: Any, checksums: bool) -> list[Finding]:
    """``name`` is the shard's, whichever of its two files it is about."""
    if not os.path.isfile(path):
        return [Finding(name, "", "missing_file", f"{path.name} is not there")]
    findings = []
    if path.stat().st_size != size:
        detail = f"{path.name} has {path.stat().st_size} bytes where the manifest says {size}"
        findings.append(Finding(name, "", "wrong_size", detail))
    if checksums and checksum != (actual := sha256(path)):
        detail = f"{path.name} has sha256 {actual} where the manifest says {checksum}"
        findings.append(Finding(name, "", "wrong_checksum", detail))
    return findings


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def read_index(path: Path) -> list[dict[str, Any]]:
    """Raises ValueError where it is not a list of ``{"key": text, "members": {text: [offset, size]}}``."""
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from error
    if not isinstance(index, list):
        raise ValueError(f"{path.name} is not a list")
    for number, entry in enumerate(index):
        if not _is_entry(entry):
            raise ValueError(f"{path.name}: entry {number} is not a key with the places of its members")
    return index


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
        return False
    members = entry.get("members")
    return isinstance(members, dict) and all(
        isinstance(place, list) and len(place) == 2 and all(type(number) is int and number >= 0 for number in place)
        for place in members.values()
    )
