"""What this machine is found to have."""

import pytest

from nemo_pre.launch.environment import machine_memory

GROUPS = {
    "0::/job/step\n": {"sys/fs/cgroup/job/memory.max": 3 << 30, "sys/fs/cgroup/job/step/memory.max": "max"},
    "0::/\n": {"sys/fs/cgroup/memory.max": 3 << 30},
    "4:cpu:/x\n9:memory:/slurm/job\n0::/\n": {"sys/fs/cgroup/memory/slurm/job/memory.limit_in_bytes": 3 << 30},
    "9:cpu,memory:/a\n": {"sys/fs/cgroup/memory/memory.limit_in_bytes": 3 << 30},
}


@pytest.mark.parametrize("groups", GROUPS)
def test_the_smallest_limit_of_the_control_groups_counts(groups, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    whole = machine_memory(tmp_path)
    assert whole > 3 << 30, "this machine has too little memory for the test"
    for name, limit in GROUPS[groups].items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    assert machine_memory(tmp_path) == 3 << 30


def test_without_control_groups_it_is_the_machines_memory(tmp_path):
    assert machine_memory(tmp_path) >= machine_memory()
