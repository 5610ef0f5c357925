"""A real Slurm for the tests that need one: virtual nodes on this machine."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.testbed.bed import INSTALL, TestBed, missing_tools


@pytest.fixture(scope="session")
def bed() -> Iterator[TestBed]:
    missing = missing_tools()
    if missing:
        pytest.skip(f"Slurm is not installed ({', '.join(missing)}): {INSTALL}")
    # Not in pytest's folder, which is closed to others: munge refuses such a place.
    bed = TestBed(Path(tempfile.mkdtemp(prefix="nemo-pre-slurm-")), nodes=5)
    try:
        bed.start()
        yield bed
    finally:
        bed.stop()
        shutil.rmtree(bed.directory, ignore_errors=True)
