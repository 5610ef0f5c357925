"""Patches are named, reversible and particular about what they replace; importing them costs nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

from nemo_pre.compat import cpu_backend, versions
from nemo_pre.compat.registry import Change, fingerprint, patch


class Base:
    def inherited(self):
        return "inherited"


class Target(Base):
    limit = 1

    @staticmethod
    def kind():
        return "static"

    def own(self):
        return "own"


@pytest.fixture(autouse=True)
def expected_versions():
    versions.check.cache_clear()
    yield
    versions.check.cache_clear()


def pretend(monkeypatch, installed):
    # Only this module's view of importlib.metadata: torch asks it too, while it is imported.
    monkeypatch.setattr(
        versions,
        "metadata",
        SimpleNamespace(version=installed.__getitem__, PackageNotFoundError=metadata.PackageNotFoundError),
    )


def changing(*changes):
    return patch("test", why="a test", until="its end")(lambda: iter(changes))


def test_revert_restores_the_exact_objects():
    before = dict(vars(Target))
    change_all = changing(
        Change(Target, "limit", 2),
        Change(Target, "kind", staticmethod(lambda: "changed")),
        Change(Target, "own", lambda self: "changed"),
        Change(Target, "inherited", lambda self: "changed"),
    )
    change_all.apply()
    change_all.apply()  # must not take the patched attributes for the originals
    assert (Target.limit, Target.kind(), Target().own(), Target().inherited()) == (2, *["changed"] * 3)
    change_all.revert()
    change_all.revert()
    after = dict(vars(Target))
    assert after.keys() == before.keys()  # "inherited" is inherited again
    assert all(after[name] is before[name] for name in before)


def test_a_target_that_is_missing_is_refused_before_anything_changes():
    change = changing(Change(Target, "limit", 2), Change(Target, "missing", 3))
    with pytest.raises(ValueError, match=r"Target\.missing, .* does not exist"):
        change.apply()
    assert Target.limit == 1
    assert not change.applied


def test_a_rewritten_function_is_refused_where_the_original_is_another():
    changing(Change(Target, "own", None, written_for=fingerprint(Target.own))).apply()
    with pytest.raises(ValueError, match=r"Target\.inherited has the source fingerprint"):
        changing(Change(Target, "inherited", None, written_for="0" * 12)).apply()


@pytest.mark.parametrize("found", ["0.16.0", "0.15.4", "0.15.30", "1.0"])
def test_an_unknown_version_is_refused_in_one_sentence(monkeypatch, found):
    pretend(monkeypatch, {"torch": "2.9.1+cu128", "megatron-core": found, "nemo_toolkit": "2.7.3"})
    change = changing(Change(Target, "limit", 2))
    with pytest.raises(
        ValueError, match=f"megatron-core {found} is installed, but .* written for megatron-core 0.15.3"
    ):
        change.apply()
    with pytest.raises(ValueError, match=found):
        cpu_backend.apply()
    assert Target.limit == 1


@pytest.mark.parametrize("found", ["2.9.0+cpu", "2.11.0+cu130"])
def test_a_local_build_of_a_known_version_is_accepted(monkeypatch, found):
    pretend(monkeypatch, {"torch": found, "megatron-core": "0.15.3", "nemo_toolkit": "2.7.3"})
    versions.check()


def test_torch_between_the_known_ones_is_refused(monkeypatch):
    pretend(monkeypatch, {"torch": "2.10.0", "megatron-core": "0.15.3", "nemo_toolkit": "2.7.3"})
    with pytest.raises(ValueError, match=r"torch 2.10.0 is installed, but .* written for torch 2.9 or 2.11"):
        versions.check()


def test_importing_the_patches_imports_nothing_heavy():
    code = (
        "import sys; from nemo_pre.compat import cpu_backend, learning_rates, progress;"
        " cpu_backend.use_cpu('cpu');"
        " print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'megatron', 'nemo', 'lightning'}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_an_unknown_platform_is_refused():
    with pytest.raises(ValueError, match="platform=tpu is unknown; choose auto, cpu or gpu"):
        cpu_backend.use_cpu("tpu")
