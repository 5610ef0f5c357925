"""The tar writer writes what Python's tarfile would, and its index points at the contents."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile

from data_prep.shards import ShardWriter, is_whole, member_bytes, write_shard


def test_random_shards_are_those_of_pythons_tarfile(tmp_path):
    rng = random.Random(0)
    for round in range(30):
        extensions = ("json", "0.jpg", "mask.png", "txt")
        samples = [
            (
                f"train-{number:09d}",
                {ext: rng.randbytes(rng.choice([0, 1, 511, 512, 513, 9000])) for ext in extensions},
            )
            for number in range(rng.randrange(6))
        ]
        entry = write_shard(tmp_path, f"s{round}", samples)
        with tarfile.open(tmp_path / "expected", "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, members in samples:
                for extension, content in members.items():
                    header = tarfile.TarInfo(f"{key}.{extension}")
                    header.size, header.mode = len(content), 0o644
                    tar.addfile(header, io.BytesIO(content))
        content = (tmp_path / f"s{round}.tar").read_bytes()
        assert content == (tmp_path / "expected").read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest() and entry["bytes"] == len(content)
        index = (tmp_path / f"s{round}.index.json").read_bytes()
        assert entry["index_sha256"] == hashlib.sha256(index).hexdigest() and is_whole(tmp_path, entry)
        for listed, (key, members) in zip(json.loads(index), samples, strict=True):
            assert listed["key"] == key
            for extension, (offset, size) in listed["members"].items():
                assert content[offset : offset + size] == members[extension]


def test_an_unfinished_shard_has_no_final_name_and_its_size_is_known_beforehand(tmp_path):
    writer = ShardWriter(tmp_path, "s")
    writer.add("a", {"json": b"{}", "jpg": bytes(513)}, text_chars=0)
    assert writer.bytes == member_bytes(b"{}") + member_bytes(bytes(513))
    assert [file.name for file in tmp_path.iterdir()] == ["s.tar.partial"]
    writer.finish()
    assert {file.name for file in tmp_path.iterdir()} == {"s.tar", "s.index.json", "s.tar.idx"}
    assert json.loads((tmp_path / "s.index.json").read_text())[0]["text_chars"] == 0
