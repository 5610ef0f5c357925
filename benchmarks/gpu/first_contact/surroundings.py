"""What the steps' processes find: the packs that were brought along, and libraries that Transformer Engine looks for.

Transformer Engine looks for NVRTC below CUDA_HOME and asks the loader, and its import fails where it lies in torch's
own packages alone. CUDA_HOME then names those, which hides a compiler from others; so it is set only where the import
fails without. If it fails with it too, Transformer Engine is left out: Megatron would not be importable beside it.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
import tarfile
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

IMPORTS = "import torch, transformer_engine.pytorch"
SEES_A_GPU = "import torch; assert torch.cuda.is_available(), 'torch sees no GPU'; torch.ones(1, device='cuda').item()"
PATIENCE = 90


def unpack(packs: Path, into: Path) -> list[Path]:
    """Every pack in a folder of its own, so that one that does harm can be left out.

    Raises:
        ValueError: there is none.
    """
    found = sorted([*packs.glob("*.tar.xz"), *packs.glob("*.whl")])
    if not found:
        raise ValueError(f"{packs} holds neither *.tar.xz nor *.whl.")

    def one(pack: Path) -> Path:
        folder = into / pack.name
        if pack.suffix == ".whl":
            with zipfile.ZipFile(pack) as wheel:
                wheel.extractall(folder)
        elif subprocess.run(["tar", "-xJf", pack, "-C", _made(folder)], capture_output=True, check=False).returncode:
            with tarfile.open(pack) as archive:  # a machine without xz
                archive.extractall(folder, filter="data")
        return folder

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, found))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def with_path(environment: Mapping[str, str], folders: list[Path]) -> dict[str, str]:
    """The environment with the folders on Python's path, behind what was there before."""
    parts = [environment.get("PYTHONPATH", ""), *map(str, folders)]
    return {**environment, "PYTHONPATH": os.pathsep.join(part for part in parts if part)}


def cuda_of_torch() -> Path:
    """Where torch's packages have CUDA's libraries."""
    return Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"


def settle(python: str, environment: Mapping[str, str], packs: list[Path]) -> tuple[dict[str, str], dict[str, Any]]:
    """The environment in which most can be imported, and what was found out on the way: also why no GPU computes
    (``no GPU``, None if one does)."""
    plain = with_path(environment, packs)
    home = cuda_of_torch()
    pointed = {**plain, "CUDA_HOME": str(home), "NVTE_CUDA_INCLUDE_DIR": str(home / "include")}
    tried = {"as it is": plain, "CUDA_HOME set to torch's packages": pointed}
    with ThreadPoolExecutor() as pool:
        gpu = pool.submit(_error, python, environment, SEES_A_GPU)
        errors = dict(zip(tried, pool.map(lambda each: _error(python, each, IMPORTS), tried.values()), strict=True))
        found: dict[str, Any] = {"no GPU": gpu.result(), "tried": errors}
    for name, each in tried.items():
        if errors[name] is None:
            return each, {**found, "Transformer Engine": f"imports: {name}"}
    left = [folder for folder in packs if not (folder / "transformer_engine").is_dir()]
    said = "left out" if len(left) < len(packs) else "cannot be imported"
    return with_path(environment, left), {**found, "Transformer Engine": said}


def _error(python: str, environment: Mapping[str, str], statement: str) -> str | None:
    """Why the statement fails; None: it does not."""
    command = [python, "-c", statement]
    try:
        run = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end after {PATIENCE} s"
    if run.returncode == 0:
        return None
    return ([line for line in run.stderr.splitlines() if line.strip()] or [f"exit code {run.returncode}"])[-1][:300]
