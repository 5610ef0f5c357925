"""The node health check says which node is bad and why."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_pre.slurm import health


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a program in place that prints these lines for the indices and the error counts of GPUs."""

    def install(indices: list[str], errors: list[str]) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text(
            '#!/bin/sh\ncase "$1" in\n'
            f"  *index) printf '%s\\n' {' '.join(indices)} ;;\n  *) printf '%s\\n' {' '.join(errors)} ;;\nesac\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return install


def test_a_node_that_has_everything_is_well(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURMD_NODENAME", "gpu07")
    assert health.main(str(tmp_path / "run"), "0", "0", "0") == 0
    assert capsys.readouterr().out == "gpu07 is well\n"
    assert not list((tmp_path / "run").iterdir()), "the probe stays behind"


def test_a_node_with_too_few_gpus_is_bad(nvidia_smi):
    nvidia_smi(["0", "1", "2"], ["0", "0", "0"])
    assert health.gpu_problem(3) is None
    assert health.gpu_problem(4) == "3 of 4 GPUs"


def test_a_node_whose_gpu_memory_has_uncorrected_errors_is_bad(nvidia_smi):
    nvidia_smi(["0", "1"], ["0", "4"])
    assert health.gpu_problem(2) == "uncorrected memory errors on GPU 1"


def test_gpus_that_count_no_errors_are_well(nvidia_smi):
    nvidia_smi(["0"], ["[N/A]"])
    assert health.gpu_problem(1) is None


def test_a_node_without_a_working_driver_is_bad(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert health.gpu_problem(1) == "nvidia-smi fails (FileNotFoundError)"


def test_a_disk_that_is_slow_or_of_another_time_is_told(tmp_path, monkeypatch):
    assert "MB/s" in str(health.disk_problem(tmp_path, "n", 1e9))
    real = health.time.time
    monkeypatch.setattr(health.time, "time", lambda: real() + 100)
    assert "its clock is 100 s away" in str(health.disk_problem(tmp_path, "n", 0))


def test_a_full_disk_is_told_without_blaming_the_node(tmp_path, capsys):
    assert health.main(str(tmp_path), "0", "1e9", "0") == 1
    assert capsys.readouterr().out.startswith("no room: ")


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in str(health.disk_problem(tmp_path / "file", "n", 0))
