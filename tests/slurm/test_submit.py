"""What nemo-pre submit writes, and what it refuses."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import replace

import pytest

from nemo_pre.checks.run import check_options
from nemo_pre.config.compose import compose_run
from nemo_pre.run_files.lock import writing
from nemo_pre.slurm.submit import parse, render, submit

RUN = [
    "experiment=digits_tiny",
    "platform=gpu",
    "cluster=slurm_site",
    "cluster.gpu=h100",
    "cluster.devices_per_node=null",
]
SITE = [
    "cluster.nodes=2",
    "cluster.account=vlm",
    "cluster.qos=high",
    "cluster.exclude=[bad1,bad2]",
    "parallel=tp2_pp2_sp",
]


def scripts(*words: str) -> list[str]:
    return [job.script for job in render(parse([*words, "--dry-run"]))]


def is_bash(script: str) -> bool:
    return subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_sizes_follow_from_the_layout_and_the_number_of_nodes():
    (script,) = scripts(*RUN, *SITE)
    for line in (
        "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--partition=gpu", "--account=vlm", "--qos=high",
        "--time=1-00:00:00", "--exclude=bad1,bad2", "--requeue", "--signal=B:USR1@180", "--open-mode=append",
        "--output=runs/digits_tiny/slurm/%j.log", "--exclusive", "--job-name=digits_tiny_4gpu_fp32",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script, line
    assert is_bash(script)


@pytest.mark.parametrize(("data", "nodes"), [(8, 1), (16, 2)])
def test_the_number_of_nodes_follows_from_the_layout_and_the_gpus_of_a_node(data, nodes):
    (script,) = scripts(*RUN[:4], "parallel=single", f"parallel.data={data}", "trainer.global_batch_size=64")
    assert f"#SBATCH --nodes={nodes}\n#SBATCH --ntasks-per-node=8\n#SBATCH --gpus-per-node=8\n" in script
    assert f"cluster.nodes={nodes}" in next(line for line in script.splitlines() if line.startswith("WORDS="))


def test_a_layout_smaller_than_a_node_takes_a_part_of_one():
    """The first job on a new site: the demo's two ranks where nodes have eight GPUs, or its CPUs."""
    first = ["experiment=digits_tiny_pre", "cluster=slurm_site", "cluster.partition=debug"]
    (script,) = scripts(*first, "cluster.gpu=a100")
    assert "#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=2\n#SBATCH --gpus-per-node=2\n" in script
    line = next(line for line in script.splitlines() if line.startswith("WORDS="))
    run = compose_run(shell_list(line, "WORDS"))
    assert check_options(replace(run, dry_run=True)) == []
    (script,) = scripts(*first, "platform=cpu")
    assert "#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=2\n" in script and "gpus-per-node" not in script
    with pytest.raises(ValueError, match=r"12 ranks do not fill nodes of cluster.devices_per_node=8: change parallel"):
        scripts(*first, "cluster.gpu=a100", "parallel=single", "parallel.data=12", "trainer.global_batch_size=48")


LARGE = ["experiment=siglip2_qwen25_72b_stage2_full_pre", "cluster=slurm_site"]
DP8 = ["parallel=single", "parallel.data=8", "trainer.global_batch_size=128", "trainer.micro_batch_size=1"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            [],
            r"cluster=slurm_site does not say which GPU its nodes have, .*: set cluster.gpu=a100\|h100\|h200\|b200, ",
        ),
        (["cluster.gpu=h100"], r"and has 68.5 GiB of one of the cluster's GPUs \(h100\): find a layout that fits"),
        (
            ["cluster.gpu=a100", "cluster.gpu_memory_gb=40"],
            r"and has 34.3 GiB of one of the cluster's GPUs \(a100\): ",
        ),
        (["cluster.gpu_memory_gb=48"], r"and has 41.1 GiB of one of the cluster's GPUs: "),
        (["platform=cpu"], r"of this machine's memory, shared by 8 ranks: send it where there are GPUs"),
        (["platform=cpu", "cluster.gpu=h100"], r"of this machine's memory, shared by 8 ranks: "),
        (
            ["platform=cpu", "cluster.memory_per_node=512G"],
            r"and has 64.0 GiB of cluster.memory_per_node=512G, shared by 8 ranks: ",
        ),
        (["cluster.gpu=v100"], r"cluster.gpu=v100 is unknown: choose one of a100, h100, h200, b200\."),
    ],
)
def test_a_site_says_what_its_gpus_hold_and_what_does_not_fit_is_not_queued(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        scripts(*LARGE, *DP8, *words)


def test_who_does_not_want_the_estimate_needs_no_gpu():
    assert scripts(*LARGE, *DP8, "trainer.ignore_memory_estimate=true")


def test_a_cpu_run_asks_for_no_gpu():
    (script,) = scripts(*RUN, "platform=cpu", "parallel=dp2")
    assert "gpus-per-node" not in script


def test_environment_and_setup_lines_stand_before_the_ranks_start():
    (script,) = scripts(*RUN, *SITE, "cluster.setup=[module load cuda]", "cluster.environment.NCCL_DEBUG=a b")
    assert "\nmodule load cuda\n" in script and "\nexport NCCL_DEBUG='a b'\n" in script
    assert script.index("module load cuda") < script.index("export NCCL_DEBUG") < script.index("srun")


def test_every_job_of_a_chain_gives_its_steps_the_cores_it_has_asked_for():
    """Slurm does not, since 22.05: read by bash as a job would, up to the first step."""
    words = ["chain=[digits_tiny,export,evaluate]", *RUN[1:], "parallel=single", "cluster.nodes=1"]
    jobs = render(parse([*words, "evaluate.suite=digits", "cluster.cpus_per_task=6", "--dry-run"]))
    assert len(jobs) == 3
    for job in jobs:
        assert "#SBATCH --cpus-per-task=6\n" in job.script, job.name
        before, _, _ = job.script.partition("\nRUN_DIR=")
        told = before.partition("\nset -euo pipefail\n")[0] + '\necho "${SRUN_CPUS_PER_TASK-unset}"'
        for asked, expected in (({"SLURM_CPUS_PER_TASK": "6"}, "6"), ({}, "unset")):
            environment = {"PATH": os.environ["PATH"], **asked}
            run = subprocess.run(["bash", "-c", told], env=environment, capture_output=True, text=True, check=True)
            assert run.stdout.strip() == expected, job.name


def test_a_container_mounts_the_working_directory_and_brings_its_own_python(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (script,) = scripts(*RUN, *SITE, "cluster.container_image=/i.sqsh", "cluster.container_mounts=[/data:/data]")
    assert f"--container-image=/i.sqsh --container-mounts={tmp_path}:{tmp_path},/data:/data" in script
    assert "\nPYTHON=python3\n" in script


def test_words_with_blanks_and_dollars_reach_the_ranks_as_they_were():
    (script,) = scripts(*RUN, *SITE, "data.path=a b$HOME'=")
    line = next(line for line in script.splitlines() if line.startswith("WORDS="))
    shown = subprocess.run(
        ["bash", "-c", line + '; printf "%s\\n" "${WORDS[@]}"'], capture_output=True, text=True, check=True
    )
    assert "data.path=a b$HOME'=" in shown.stdout.splitlines()


def test_a_directory_of_any_name_reaches_slurm_and_every_link_of_a_chain():
    """sbatch reads a quoted option as a shell does, but for % in the name of a log."""
    where = 'runs/a b/it\'s [x], "q"=5%/ü;$HOME&(z)#'
    jobs = render(
        parse(["chain=[digits_tiny,digits_tiny_pre,export]", *RUN[1:], "parallel=single", "cluster.nodes=1",
               f"output_dir={where}/${{name}}", "--dry-run"])
    )  # fmt: skip
    (log,) = [line for line in jobs[0].script.splitlines() if line.startswith("#SBATCH --output=")]
    assert shlex.split(log)[1] == f"--output={where.replace('%', '%%')}/digits_tiny/slurm/%j.log"
    words = shell_list(next(line for line in jobs[1].script.splitlines() if line.startswith("WORDS=")), "WORDS")
    assert f"init_from={where}/digits_tiny/checkpoints" in words
    run = compose_run(words)
    assert (run.output_dir, run.init_from) == (f"{where}/digits_tiny_pre", f"{where}/digits_tiny/checkpoints")
    exported = shlex.split(jobs[2].script.splitlines()[-1])
    assert exported[-2:] == [f"{where}/digits_tiny_pre/checkpoints", f"{where}/digits_tiny_pre/hf"]
    assert all(is_bash(job.script) for job in jobs)


def shell_list(line: str, name: str) -> list[str]:
    """What a list of bash holds after the line that sets it."""
    program = line + f'; printf "%s\\0" "${{{name}[@]}}"'
    return subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


def test_a_chain_hands_each_stage_the_former_ones_checkpoints():
    jobs = render(
        parse(["chain=[digits_tiny,digits_tiny_pre,export,evaluate]", *RUN[1:], "parallel=single", "cluster.nodes=1",
               "evaluate.suite=digits", "--dry-run"])
    )  # fmt: skip
    assert [job.name for job in jobs] == [
        "digits_tiny", "digits_tiny_pre", "digits_tiny_pre-export", "digits_tiny_pre-evaluate",
    ]  # fmt: skip
    assert "init_from" not in jobs[0].script.split("set -uo")[0]
    assert "init_from=runs/digits_tiny/checkpoints" in jobs[1].script
    assert "export runs/digits_tiny_pre/checkpoints runs/digits_tiny_pre/hf" in jobs[2].script
    assert "evaluate runs/digits_tiny_pre/hf suite=digits" in jobs[3].script
    assert "--gpus-per-node=1" in jobs[3].script and "gpus-per-node" not in jobs[2].script
    assert all(is_bash(job.script) for job in jobs)


def test_a_sweep_is_an_array_with_a_directory_for_every_combination():
    (script,) = scripts(*RUN, *SITE, "sweep=optim.lr=1e-4,3e-4", "sweep=seed=1,2")
    assert "#SBATCH --array=0-3\n" in script and "--output=runs/digits_tiny/slurm/%A_%a.log" in script
    assert "RUN_DIR=runs/digits_tiny-lr-1e-4-seed-2" in script
    assert script.count("RUN_DIR=runs/digits_tiny-lr-3e-4-") == 2
    assert is_bash(script)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--force"], "'--force' is not an option of nemo-pre submit"),
        (["trainer.max_stepz=3"], "There is no option trainer.max_stepz"),
        (["cluster=mars"], "cluster=mars does not exist: choose one of"),
        (["cluster=local"], "cluster=local is this machine"),
        (["cluster.nodes=3"], "The layout's 4 ranks cannot be divided among cluster.nodes=3"),
        (["cluster.time_limit=86400"], "cluster.time_limit=86400 is not days-hours:minutes:seconds"),
        (["cluster.sbatch_options=[exclusive]"], "cluster.sbatch_options has 'exclusive'"),
        (["resume=false"], "resume=false would make a requeued job begin anew"),
        (["cluster.max_failures=0"], "cluster.max_failures=0 must be 1 or more"),
        (["output_dir=a\\b"], "has a \\ or a line break"),
        (["chain=[a,b]"], "experiment= and chain= both name runs"),
        (["sweep=optim.lr"], "sweep=optim.lr is not OPTION=VALUE,VALUE"),
        (["sweep=seed=1,2", "output_dir=x"], "need directories of their own"),
        (["evaluate.suite=pre"], "evaluate.suite=pre has no effect"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(words, sentence):
    with pytest.raises(ValueError) as error:
        scripts(*RUN, *SITE, *words)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["chain=[export]"], "must be experiments, then"),
        (["chain=[digits_tiny,evaluate]"], "must end with export"),
        (["chain=[digits_tiny,digits_tiny]"], "need directories of their own"),
        (["chain=[digits_tiny,export]", "export.colour=red"], "is not an option of nemo-pre export"),
    ],
)
def test_a_chain_that_cannot_work_is_refused_in_one_sentence(words, sentence):
    with pytest.raises(ValueError) as error:
        scripts(*RUN[1:], "parallel=single", "cluster.nodes=1", *words)
    assert sentence in str(error.value)


def test_without_slurm_submitting_says_where_to_do_it(monkeypatch, digits):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="There is no sbatch on this machine"):
        submit([*RUN, *SITE, f"data.path={digits}"])


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """sbatch counts jobs from 1 on, all of which wait until the file ``queue`` says otherwise."""
    place = tmp_path / "bin"
    place.mkdir()
    programs = {
        "sbatch": f"n=$(($(cat {place}/n 2>/dev/null || echo 0) + 1)); echo $n > {place}/n; echo $n",
        "squeue": f"cat {place}/queue 2>/dev/null || echo PENDING",
    }
    for name, program in programs.items():
        (place / name).write_text(f"#!/bin/sh\n{program}\n")
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return place


def test_a_folder_whose_job_waits_or_runs_gets_no_second_one(fake_slurm, digits, capsys):
    chain = ["chain=[digits_tiny,digits_tiny_pre,export]", *RUN[1:], "parallel=single", "cluster.nodes=1"]
    chain += [f"data.path={digits}", "platform=cpu"]
    submit(chain)  # whose later jobs wait for the earlier ones
    one = ["experiment=digits_tiny_pre", *chain[1:]]
    for words in (chain, one):
        with pytest.raises(ValueError, match=r"has job [12] already, which is PENDING: wait for it"):
            submit(words)
    (fake_slurm / "queue").write_text("COMPLETED\n")
    submit(one)
    assert (fake_slurm / "n").read_text() == "4\n"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "next" not in line] == ["1", "2", "3", "4"]
    assert lines[-1] == "1 job(s) in the queue; next: squeue -j 4, and tail -f runs/digits_tiny_pre/slurm/*.log"
    (fake_slurm / "queue").unlink()
    with pytest.raises(ValueError, match="has job 4 already"):
        submit(one)


def test_the_runs_of_a_sweep_are_tasks_of_its_job(fake_slurm, digits):
    sweep = [*RUN[:1], *RUN[2:], "platform=cpu", "parallel=single", "cluster.nodes=1", f"data.path={digits}"]
    submit([*sweep, "sweep=seed=1,2"])
    with pytest.raises(ValueError, match="output_dir=runs/digits_tiny-seed-2 has job 1_1 already"):
        submit([*sweep, "name=digits_tiny-seed-2"])
    submit([*sweep, "name=digits_tiny-seed-3"])


def test_a_folder_that_a_process_writes_to_gets_no_job(fake_slurm, digits):
    with writing("runs/digits_tiny"):
        with pytest.raises(ValueError, match="output_dir=runs/digits_tiny is being written by process"):
            submit([*RUN[:1], *RUN[2:], "platform=cpu", "parallel=single", "cluster.nodes=1", f"data.path={digits}"])
    assert not (fake_slurm / "n").exists()
