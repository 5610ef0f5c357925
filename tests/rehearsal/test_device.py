"""The GPU that is not there: what it knows, what it counts, and that everything is as it was afterwards."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nemo_pre.compat import rehearsed_device, rehearsed_groups, rehearsed_kernels, versions
from nemo_pre.compat.rehearsed_kernels import attention, pairs_of
from nemo_pre.rehearsal.device import Rehearsed, UnknownValue
from nemo_pre.rehearsal.groups import Groups
from nemo_pre.rehearsal.memory import Memory


@pytest.fixture
def device():
    """A device of which every byte is told."""
    made = Rehearsed(Groups(lambda name, mine, ranks: [mine] * len(ranks)), Memory(named_from=1))
    patches = [
        rehearsed_device.device_guard_without_driver,
        rehearsed_device.cuda_without_gpu(8, made.memory),
        rehearsed_device.fake_data,
    ]
    for each in patches:
        each.apply()
    with made:
        yield made
    for each in reversed(patches):
        each.revert()


def test_what_follows_from_the_hosts_integers_is_known_on_the_device(device):
    tokens = torch.tensor([[3, -200, 5], [-200, 7, 8]])
    on_device = tokens.cuda()
    assert on_device.device.type == "cuda"
    row, column = torch.where(on_device == -200)
    assert row.shape == (2,) and [int(value) for value in column] == [1, 0]
    assert on_device[on_device > 0].shape == (4,)
    assert on_device.cpu().tolist() == tokens.tolist()
    assert int(on_device.max()) == 8


def test_an_integer_that_follows_from_weights_stops_the_rehearsal_and_a_float_is_told(device):
    weights = torch.randn(8, 8, device="cuda")
    assert float(weights.sum()) == 1.0 and sum(device.guesses.values()) == 1
    with pytest.raises(UnknownValue, match="an integer that a rehearsal does not know"):
        int(weights.argmax())
    with pytest.raises(UnknownValue):
        weights[weights > 0]


def test_a_call_of_both_devices_is_refused_and_the_ranks_shape_too(device):
    here, there = torch.zeros(4), torch.zeros(4, device="cuda")
    with pytest.raises(RuntimeError, match="cpu"):
        here * there
    with pytest.raises(RuntimeError):
        torch.zeros(4, 4, device="cuda") @ torch.zeros(5, 4, device="cuda")
    convolution = torch.nn.Conv2d(3, 8, 2)  # left on the host
    with pytest.raises(RuntimeError):
        convolution(torch.zeros(1, 3, 8, 8, device="cuda"))


def test_waits_copies_kernels_and_flops_are_counted_by_phase(device):
    device.groups.phase = "1"
    numbers = torch.arange(6).cuda()
    left = torch.zeros(4, 8, device="cuda")
    (left @ left.t()).view(2, 8)  # the view launches nothing
    numbers.nonzero()
    numbers.tolist()
    assert device.flops["1"] == 2 * 4 * 8 * 4
    assert sum(device.waits["1"].values()) == 2 and sum(device.copies["1"].values()) == 1
    before = device.kernels["1"]
    left.view(8, 4)
    torch.empty(3, device="cuda")
    assert device.kernels["1"] == before
    left[numbers[:4] > 1] = 0.0  # torch makes a fill of it, without a wait
    assert sum(device.waits["1"].values()) == 2


def test_memory_is_what_lives_and_its_peak(device):
    memory = device.memory
    kept = torch.zeros(256, device="cuda")
    memory.start_peak()
    start = memory.held
    more = [torch.zeros(256, device="cuda") for _ in range(3)]
    view = more[0][:10]
    assert memory.held == start + 3 * 1024
    del more
    assert memory.held == start + 1024 and memory.most == start + 3 * 1024
    at_peak = memory.lines_at_peak(without={kept.untyped_storage()._cdata})
    assert sum(size for _, size in at_peak) == 3 * 1024 and "[256] float32" in at_peak[0][0]
    del view
    assert memory.held == start
    assert torch.cuda.memory_allocated() == start


def test_tensors_tell_their_storages_apart_by_address(device):
    first, second = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")
    assert first.data_ptr() != second.data_ptr()
    assert first[1:].data_ptr() == first.data_ptr() + 4 and first.view(2, 2).data_ptr() == first.data_ptr()


def test_attention_allocates_what_a_kernel_keeps_and_refuses_what_does_not_fit(device):
    counted = []
    query, key = torch.zeros(2, 8, 16, 4, device="cuda"), torch.zeros(2, 2, 32, 4, device="cuda")
    out = attention(query, key, key, 2 * pairs_of(16, 32, causal=True), counted.append)
    assert out.shape == query.shape
    assert counted == [4.0 * 8 * 4 * 2 * (16 * 16 + 16 * 17 / 2)]
    with pytest.raises(ValueError, match="tensors on"):
        attention(query, key.cpu(), key, 1.0, counted.append)
    with pytest.raises(ValueError, match="queries"):
        attention(query, key[..., :2], key[..., :2], 1.0, counted.append)


@pytest.mark.parametrize(
    "queries, keys, causal, pairs", [(4, 4, True, 10), (2, 4, True, 7), (4, 4, False, 16), (1, 9, True, 9)]
)
def test_pairs_that_see_each_other(queries, keys, causal, pairs):
    assert pairs_of(queries, keys, causal) == pairs


def test_every_change_is_undone_exactly():
    memory, groups = Memory(), Groups(lambda *_: [])
    patches = [
        rehearsed_device.cuda_without_gpu(2, memory),
        rehearsed_device.fake_data,
        rehearsed_groups.groups_without_ranks(0, 4, groups),
        rehearsed_kernels.attention_without_kernels(lambda flops: None),
    ]
    owners = (torch, torch.cuda, torch.cuda.random, torch.nn.functional, dist, torch.Tensor)
    before = [dict(vars(owner)) for owner in owners]
    for each in patches:
        each.apply()
    assert torch.cuda.device_count() == 2
    for each in reversed(patches):
        each.revert()
    for owner, names in zip(owners, before, strict=True):
        assert all(vars(owner).get(name) is value for name, value in names.items())
        assert set(names) == set(vars(owner))


def test_the_guards_functions_lie_where_the_installed_torchs_header_has_them():
    """torch's wheels have the header, whose virtual functions lie in the table in its order."""
    header = Path(torch.__file__).parent / "include" / "c10" / "core" / "impl" / "DeviceGuardImplInterface.h"
    interface = re.sub(r"//.*|/\*(.|\n)*?\*/", "", header.read_text()).split("struct NoOpDeviceGuardImpl")[0]
    names = re.findall(r"virtual\s[^(;{]*?(~?\w+)\s*\(", interface)
    found = versions.matching(str(versions.installed("torch")), tuple(rehearsed_device.GUARDS))
    assert found is not None
    guard = rehearsed_device.GUARDS[found]
    assert names[:4] == ["type", "exchangeDevice", "getDevice", "setDevice"]
    streams = ["getStream", "getDefaultStream", "getStreamFromGlobalPool", "getNewStream", "exchangeStream"]
    assert [names[place] for place in guard.streams] == streams
    assert [names[place] for place in guard.events] == ["destroyEvent", "record", "block", "synchronizeEvent"]
    assert names[guard.count] == "deviceCount"
    assert names[-1].startswith("~") and guard.slots == len(names) + 1, "a destructor takes two places"


def test_a_module_that_was_made_on_the_device_can_be_moved(device):
    """Its parameters are made of detached tensors, the first of each shape not from torch's memory of fake results."""
    linear = torch.nn.Linear(311, 13, device="cuda")
    assert linear.to(torch.cuda.current_device()).weight.device.type == "cuda"
