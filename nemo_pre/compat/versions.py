"""The versions that the compatibility patches were written for."""

from __future__ import annotations

import functools
from importlib import metadata

# Distribution name: versions. Two numbers stand for any patch release, three for exactly that release. torch 2.9 is
# what is installed and tested. 2.11 is for GPU machines that bring it: tests/parity passes with it on CPUs, but a
# backward pass that asks for a CUDA tensor fails there, since cpu_device does not see it.
WRITTEN_FOR = {"torch": ("2.9", "2.11"), "megatron-core": ("0.15.3",), "nemo_toolkit": ("2.7.3",)}


@functools.cache  # reading the metadata takes a tenth of a second, and every patch asks
def check() -> None:
    """Refuse versions whose internals may differ from what the patches replace.

    Raises:
        ValueError: one sentence naming the package, the version found and the version expected.
    """
    for package, versions in WRITTEN_FOR.items():
        expected = " or ".join(versions)
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise ValueError(f"{package} is not installed; nemo-pre needs {package} {expected}.") from None
        public = found.split("+")[0]  # "2.9.1+cu128" is 2.9.1
        if not any(public == version or public.startswith(version + ".") for version in versions):
            raise ValueError(
                f"{package} {found} is installed, but nemo-pre's compatibility patches were written for"
                f" {package} {expected}: install the versions of the lock file."
            )
