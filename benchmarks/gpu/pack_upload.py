"""Builds what is sent to a GPU machine without a network: the files that git tracks, and the packs beside them.

    python -m benchmarks.gpu.pack_upload OUT.tar.gz --packs FOLDER [--limit MIB]
    python -m benchmarks.gpu.pack_upload OUT.tar.gz --packs FOLDER --rehearse FOLDER --python PYTHON

What is tracked is taken as it lies in the working tree. The packs (*.tar.xz and *.whl, for PYTHONPATH) lie in
``packs/`` of the upload. Counted are the bytes of all files, as they lie there. With ``--rehearse`` the upload is
unpacked and the call is made there, on this machine's CPU, by a Python like the GPU machine's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 64  # MiB
SHOWN = 5
MIB = 1 << 20
PACKS = "packs"
CALL = "benchmarks/gpu/first_contact.sh"


def tracked(root: Path) -> dict[str, Path]:
    """The files that git tracks, by their names in the upload.

    Raises:
        ValueError: it is no clone, or a tracked file is missing.
    """
    listing = subprocess.run(["git", "-C", root, "ls-files", "-z"], capture_output=True, text=True, check=False)
    if listing.returncode:
        raise ValueError(f"{root} is no clone that git lists: {listing.stderr.strip()}")
    found = {name: root / name for name in listing.stdout.split("\0") if name}
    missing = [name for name, path in found.items() if not path.exists() and not path.is_symlink()]
    if missing:
        raise ValueError(f"git tracks {missing[0]}, which is not there: restore it, or remove it from git.")
    return found


def packs_in(folder: Path) -> dict[str, Path]:
    """The packs, by their names in the upload.

    Raises:
        ValueError: there is none.
    """
    found = {f"{PACKS}/{path.name}": path for path in sorted([*folder.glob("*.tar.xz"), *folder.glob("*.whl")])}
    if not found:
        raise ValueError(f"{folder} holds neither *.tar.xz nor *.whl.")
    return found


def refuse_too_large(files: Mapping[str, Path], limit: float) -> float:
    """The upload's MiB.

    Raises:
        ValueError: they are more than ``limit``; the sentence names the largest files.
    """
    sizes = {name: path.lstat().st_size for name, path in files.items()}
    total = sum(sizes.values()) / MIB
    if total > limit:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:SHOWN]
        named = ", ".join(f"{name} ({sizes[name] / MIB:.1f})" for name in largest)
        raise ValueError(
            f"The upload has {total:.1f} MiB and may have {limit:g}: leave out some of the largest files,"
            f" in MiB {named}."
        )
    return total


def write(files: Mapping[str, Path], out: Path) -> None:
    """One archive, whole or not at all. The packs do not become smaller, so nothing is squeezed hard."""
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    with tarfile.open(unfinished, "w:gz", compresslevel=1) as archive:
        for name, path in files.items():
            archive.add(path, name, recursive=False)
    unfinished.replace(out)


def rehearse(upload: Path, folder: Path, python: str, arguments: list[str]) -> int:
    """Make the call where the upload lies unpacked, with nothing of this environment; its exit code.

    Raises:
        ValueError: the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: the upload is rehearsed in a folder of its own.")
    tree, out = folder / "tree", folder / "out"
    with tarfile.open(upload) as archive:
        archive.extractall(tree, filter="data") if sys.version_info >= (3, 12) else archive.extractall(tree)
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    environment |= {"PYTHON": python, "PACKS": str(tree / PACKS)}
    began = time.monotonic()
    code = subprocess.run(
        ["bash", str(tree / CALL), str(out), "--on-cpu", *arguments], env=environment, check=False
    ).returncode
    brought_back = [path for path in out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in brought_back) / MIB
    print(
        f"the call took {time.monotonic() - began:.0f} s and brings back {len(brought_back)} files of {size:.2f} MiB"
    )
    return code


def main() -> None:
    """Ends with 0, with the rehearsed call's exit code, or with one sentence."""
    parser = argparse.ArgumentParser(description="The upload for a GPU machine without a network.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--packs", type=Path, required=True, help="folder of *.tar.xz and *.whl")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"MiB; default {LIMIT}")
    parser.add_argument(
        "--rehearse", type=Path, metavar="FOLDER", help="an empty folder to make the call in, on the CPU"
    )
    parser.add_argument("--python", default=sys.executable, help="the interpreter that rehearses")
    parser.add_argument("--only", help="steps of the rehearsal, with commas")
    arguments = parser.parse_args()
    try:
        files = {**tracked(ROOT), **packs_in(arguments.packs)}
        total = refuse_too_large(files, arguments.limit)
        write(files, arguments.out)
        print(f"{arguments.out}: {len(files)} files, {total:.1f} MiB of {arguments.limit:g}")
        if arguments.rehearse is not None:
            only = ["--only", arguments.only] if arguments.only else []
            sys.exit(rehearse(arguments.out, arguments.rehearse, arguments.python, only))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
