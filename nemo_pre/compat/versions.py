"""The versions that the compatibility patches were written for.

Two numbers stand for any patch release, three for exactly that release. torch 2.9 is what is installed and tested.
2.11 is for GPU machines that bring it: tests/parity passes with it on CPUs, but a backward pass that asks for a CUDA
tensor fails there, since cpu_device does not see it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from importlib import metadata

Versions = Mapping[str, Sequence[str]]  # by the name of the distribution

SUPPORTED: Versions = {"torch": ("2.9", "2.11"), "megatron-core": ("0.15.3", "0.19"), "nemo_toolkit": ("2.7.3",)}
OPTIONAL = ("nemo_toolkit",)
NEMO_NEEDS = "0.15.3"  # of megatron-core, to run


@functools.cache  # reading the metadata takes a tenth of a second, and every patch asks
def installed(package: str) -> str | None:
    """The version of an installed distribution without its local part (2.9.1+cu128 is 2.9.1); None: there is none."""
    try:
        return metadata.version(package).split("+")[0]
    except metadata.PackageNotFoundError:
        return None


def matching(found: str, versions: Sequence[str]) -> str | None:
    """Which of ``versions`` the version ``found`` is one of; None: none."""
    return next((each for each in versions if found == each or found.startswith(each + ".")), None)


def check_nemo() -> None:
    """Refuse what needs NeMo where there is none.

    Raises:
        ValueError: one sentence that says what to install.
    """
    if installed("nemo_toolkit") is None:
        raise ValueError(
            "nemo-pre trains, asks and rehearses models with NeMo, which is not installed: install the extra nemo,"
            " or run a loop of your own on Megatron-Core (docs/megatron-core.md)."
        )


@functools.cache
def check() -> None:
    """Refuse versions whose internals may differ from what the patches replace.

    Raises:
        ValueError: one sentence naming the package, the version found and the version expected.
    """
    for package, versions in SUPPORTED.items():
        expected = " or ".join(versions)
        found = installed(package)
        if found is None:
            if package in OPTIONAL:
                continue
            raise ValueError(f"{package} is not installed; nemo-pre needs {package} {expected}.")
        if matching(found, versions) is None:
            raise ValueError(
                f"{package} {found} is installed, but nemo-pre's compatibility patches were written for"
                f" {package} {expected}: install the versions of the lock file."
            )
    megatron = installed("megatron-core")
    if installed("nemo_toolkit") is not None and megatron != NEMO_NEEDS:
        raise ValueError(
            f"nemo_toolkit is installed beside megatron-core {megatron}, on which it does not run: install"
            f" megatron-core {NEMO_NEEDS} (the extra nemo), or uninstall nemo_toolkit (the extra core)."
        )
