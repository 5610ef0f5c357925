"""Broken datasets, each following from its number alone: a sound one with a mutation in one place."""

from __future__ import annotations

import copy
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.shards import Sample, write_shard
from tests.data_validate.small import samples, seal

TAR, INDEX, MANIFEST = "train-00000.tar", "train-00000.index.json", "manifest.json"
# (offset, length) in a header, without the padding: POSIX.1-1988
HEADER = {"name": (0, 100), "mode": (100, 8), "size": (124, 12), "checksum": (148, 8), "type": (156, 1)}
HEADER |= {"linkname": (157, 100), "magic": (257, 8), "prefix": (345, 155)}
DEEP = b"[" * 100_000  # deeper than the JSON parser goes
EDGES: list[Any] = [None, True, 0, -1, 7, 10**6, 10**12, 2**63, 10**40, 0.5, 1e300, float("inf"), float("nan"), ""]
EDGES += ["<image>", "\ud800", "\0", "../x", "x" * 300, "\u4e09", [], {}, [[]], [1, 2, 3], {"key": 1}, ["human"]]


def mutate_tar(out: Path, rng: random.Random) -> None:
    file = out / TAR
    tar = bytearray(file.read_bytes())
    if rng.random() < 0.5:
        tar = bytearray(mutated(bytes(tar), rng))
    else:
        _edit_header(tar, rng)
    file.write_bytes(tar)
    seal(out)


def mutate_record(out: Path, rng: random.Random) -> None:
    def change(content: bytes) -> bytes:
        if rng.random() < 0.02:
            return DEEP
        if rng.random() < 0.5:
            return mutated(content, rng)
        return json.dumps(edited(json.loads(content), rng)).encode()

    _rewrite(out, rng, lambda name: name == "json", change)


def mutate_image(out: Path, rng: random.Random) -> None:
    _rewrite(out, rng, lambda name: name != "json", lambda content: mutated(content, rng))


def mutate_index(out: Path, rng: random.Random) -> None:
    _mutate_json(out / INDEX, rng)
    seal(out)


def mutate_manifest(out: Path, rng: random.Random) -> None:
    _mutate_json(out / MANIFEST, rng)


MUTATIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "tar": mutate_tar,
    "record": mutate_record,
    "image": mutate_image,
    "index": mutate_index,
    "manifest": mutate_manifest,
}


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Bits flipped, or a part cut off, taken out, zeroed, repeated, moved or put in."""
    data = bytearray(content)
    first, last = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    kind = rng.choice(("flip", "flip", "truncate", "delete", "zero", "repeat", "move", "insert"))
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del data[first:]
    elif kind == "delete":
        del data[first:last]
    elif kind == "zero":
        data[first:last] = bytes(last - first)
    elif kind == "repeat":
        data[last:last] = data[first:last]
    elif kind == "move":
        part = data[first:last]
        del data[first:last]
        place = rng.randrange(len(data) + 1)
        data[place:place] = part
    else:
        data[first:first] = rng.randbytes(rng.choice((1, 3, 512)))
    return bytes(data)


def edited(tree: Any, rng: random.Random) -> Any:
    """JSON in which one node is replaced, removed or doubled."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places:
        return rng.choice(EDGES)
    parent, name = rng.choice(places)
    kind = rng.random()
    if kind < 0.2:
        del parent[name]
    elif kind < 0.3 and isinstance(parent, list):
        parent.insert(name, copy.deepcopy(parent[name]))
    elif kind < 0.4 and isinstance(parent[name], int):
        parent[name] += rng.choice((-512, -1, 1, 512))
    else:
        parent[name] = copy.deepcopy(rng.choice(EDGES))
    return tree


def _places(tree: Any) -> Any:
    nodes = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for name, value in nodes:
        yield tree, name
        yield from _places(value)


def _mutate_json(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    if rng.random() < 0.02:
        file.write_bytes(DEEP)
    elif rng.random() < 0.5:
        file.write_bytes(mutated(content, rng))
    else:
        file.write_text(json.dumps(edited(json.loads(content), rng)))


def _edit_header(tar: bytearray, rng: random.Random) -> None:
    starts = [start for start in range(0, len(tar), 512) if tar[start + 257 : start + 262] == b"ustar"]
    start = rng.choice(starts)
    offset, length = HEADER[rng.choice(list(HEADER))]
    value = rng.choice(
        (
            bytes(length),
            b"\xff" * length,  # a negative number in GNU's base 256
            b"\x80" + b"\x7f" * (length - 1),
            b"7" * length,
            b"0" * (length - 1) + b"\0",
            b" " * length,
            b"../val-0.json"[:length].ljust(length, b"\0"),
            rng.randbytes(length),
            rng.choice((b"1", b"2", b"5", b"L", b"x", b"S")) * length,
        )
    )
    tar[start + offset : start + offset + length] = value
    if rng.random() < 0.7:  # else the checksum shows it
        header = bytearray(tar[start : start + 512])
        header[148:156] = b" " * 8
        tar[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    assert len(tar) % tarfile.BLOCKSIZE == 0


def _rewrite(out: Path, rng: random.Random, of: Callable[[str], bool], change: Callable[[bytes], bytes]) -> None:
    """One member of one training sample changed, and the tar and its index written anew."""
    train: list[Sample] = samples("train")
    key, members = rng.choice([sample for sample in train if any(map(of, sample[1]))])
    name = rng.choice([name for name in members if of(name)])
    members[name] = change(members[name])
    write_shard(out, "train-00000", train)
    seal(out)
