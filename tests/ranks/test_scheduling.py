"""Parity tests go by layout, all others by file."""

from __future__ import annotations

import pytest

from tests.ranks.scheduling import group


@pytest.mark.parametrize(
    "nodeid, expected",
    [
        ("tests/parity/test_parity.py::test_a[PP2]", "PP2"),
        ("tests/parity/test_parity.py::test_a[PP2-first]", "PP2"),
        ("tests/parity/test_laver_parity.py::test_b[full-PP2-VPP2]", "PP2-VPP2"),
        ("tests/parity/test_laver_parity.py::test_b[TP2-PP2-SP-two]", "TP2-PP2-SP"),
        ("tests/parity/test_native_parity.py::test_c[qwen25_vl-TP2-SP-PP2-CP2-DP2]", "many ranks"),
        ("tests/parity/test_parity.py::test_d[TP4-SP-PP4]", "many ranks"),
        ("tests/parity/test_native_parity.py::test_e[pre0-aimv2_native]", "tests/parity/test_native_parity.py"),
        ("tests/training/test_resume.py::test_f[PP2]", "tests/training/test_resume.py"),
    ],
)
def test_the_group_of_a_test(nodeid, expected):
    assert group(nodeid) == expected


def test_the_tests_of_a_layout_follow_each_other(request):
    """In whatever was collected with this file."""
    groups = [group(item.nodeid) for item in request.session.items]
    blocks = [name for name, before in zip(groups, [None, *groups], strict=False) if name != before]
    assert len(blocks) == len(set(blocks))
