"""What a GPU rank finds in its environment, and that the user's own values stay."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nemo_pre.config.schema import ParallelConfig
from nemo_pre.launch import gpu_settings as settings
from nemo_pre.launch.gpu_settings import compute_capability, gpu_settings, set_gpu_environment

CONNECTIONS, ALLOCATOR = "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF"
MARGINS = {"NVTE_FWD_LAYERNORM_SM_MARGIN", "NVTE_BWD_LAYERNORM_SM_MARGIN"}
BESIDE = MARGINS | {"TORCH_NCCL_HIGH_PRIORITY"}  # messages run beside what is computed
HOPPER, BLACKWELL = 9, 10


@pytest.mark.parametrize(
    "layout, capability, connections, beside",
    [
        ({}, HOPPER, None, False),
        ({"data": 8}, HOPPER, None, True),
        ({"pipeline": 2}, BLACKWELL, None, True),
        ({"tensor": 2, "sequence": True}, HOPPER, "1", True),
        ({"tensor": 2}, 8, "1", True),
        ({"context": 2}, HOPPER, "1", True),
        ({"tensor": 2, "sequence": True}, BLACKWELL, "32", True),
        ({"context": 4, "data": 2}, 12, "32", True),
        ({"tensor": 8, "sequence": True}, None, None, True),
    ],
)
def test_the_settings_follow_from_layout_and_gpu(layout, capability, connections, beside):
    found = gpu_settings(ParallelConfig(**layout), capability)
    assert found.get(CONNECTIONS) == connections
    assert (found.keys() >= BESIDE) == beside == bool(found.keys() & BESIDE)
    assert found[ALLOCATOR] == "expandable_segments:True"


def test_what_the_user_has_set_stays_under_its_former_name_too(monkeypatch):
    monkeypatch.setattr(settings, "compute_capability", lambda: HOPPER)
    layout = ParallelConfig(tensor=2, sequence=True)
    own = {CONNECTIONS: "8", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512", "TORCH_NCCL_HIGH_PRIORITY": "0"}
    environment = dict(own)
    set_gpu_environment(layout, environment)
    assert {name: environment[name] for name in own} == own
    assert environment.keys() - own.keys() == MARGINS
    untouched: dict[str, str] = {}
    set_gpu_environment(layout, untouched)
    assert untouched == gpu_settings(layout, HOPPER)


@pytest.mark.parametrize(
    "listing, capability",
    [("9.0\n9.0\n", 9), ("10.3\n", 10), ("12.0\n", 12), ("", None), ("No devices were found\n", None)],
)
def test_the_gpu_is_asked_without_torch(tmp_path, monkeypatch, listing, capability):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{listing}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compute_capability() == capability
    (tmp_path / "nvidia-smi").unlink()
    assert compute_capability() is None


def test_the_documentation_names_every_setting_and_no_other():
    text = (Path(__file__).parents[2] / "docs/cluster.md").read_text().split("## A GPU rank's environment")[1]
    named = set(re.findall(r"^\| `([A-Z_]+)", text.split("\n## ")[0], re.MULTILINE))
    named |= {name.replace("FWD", "BWD") for name in named & MARGINS}
    assert named == gpu_settings(ParallelConfig(tensor=2, sequence=True), HOPPER).keys()
