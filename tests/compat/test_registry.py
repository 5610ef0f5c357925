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
    forget()
    yield
    forget()


def forget():
    versions.check.cache_clear()
    versions.installed.cache_clear()


def pretend(monkeypatch, installed):
    # Only this module's view of importlib.metadata: torch asks it too, while it is imported.
    def version(package):
        if package not in installed:
            raise metadata.PackageNotFoundError(package)
        return installed[package]

    found = SimpleNamespace(version=version, PackageNotFoundError=metadata.PackageNotFoundError)
    monkeypatch.setattr(versions, "metadata", found)


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


@pytest.mark.parametrize("found", ["0.16.0", "0.15.4", "0.15.30", "0.18.2", "1.0"])
def test_an_unknown_version_is_refused_in_one_sentence(monkeypatch, found):
    pretend(monkeypatch, {"torch": "2.9.1+cu128", "megatron-core": found, "nemo_toolkit": "2.7.3"})
    change = changing(Change(Target, "limit", 2))
    with pytest.raises(
        ValueError, match=f"megatron-core {found} is installed, but .* written for megatron-core 0.15.3 or 0.19"
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


@pytest.mark.parametrize("megatron", ["0.15.3", "0.19.0", "0.19.2"])
def test_nemo_need_not_be_there(monkeypatch, megatron):
    pretend(monkeypatch, {"torch": "2.9.1", "megatron-core": megatron})
    versions.check()


def test_nemo_beside_a_megatron_it_does_not_run_on_is_refused_in_one_sentence(monkeypatch):
    pretend(monkeypatch, {"torch": "2.9.1", "megatron-core": "0.19.2", "nemo_toolkit": "2.7.3"})
    with pytest.raises(ValueError, match=r"beside megatron-core 0\.19\.2.*: install megatron-core 0\.15\.3"):
        changing(Change(Target, "limit", 2)).apply()


def test_what_needs_nemo_is_refused_before_ranks_start_where_there_is_none(monkeypatch):
    from nemo_pre.launch.ranks import launch

    pretend(monkeypatch, {"torch": "2.9.1", "megatron-core": "0.19.2"})
    with pytest.raises(ValueError, match=r"NeMo, which is not installed: install the extra nemo"):
        launch(SimpleNamespace(parallel=None), "nemo_pre.train:run_rank")


def test_torch_has_to_be_there(monkeypatch):
    pretend(monkeypatch, {"megatron-core": "0.19.2"})
    with pytest.raises(ValueError, match="torch is not installed"):
        versions.check()


OF = {
    "what is absent": {"nemo_toolkit": ("2.7.3",)},
    "what needs it": {"megatron-core": ("0.15.3", "0.19"), "torch": ("2.9",)},
    "what does not need it": {"megatron-core": ("0.15.3",)},
}


@pytest.mark.parametrize("of, changes", zip(OF, (False, True, False), strict=True))
def test_a_patch_changes_nothing_where_it_is_not_needed_and_says_why(monkeypatch, of, changes):
    pretend(monkeypatch, {"torch": "2.9.1", "megatron-core": "0.19.2"})
    unneeded = {"megatron-core 0.19": "it is mended"} if of == "what does not need it" else {}
    change = patch("test", why="a test", until="its end", of=OF[of], unneeded=unneeded)(
        lambda: iter([Change(Target, "limit", 2)])
    )
    change.apply()
    assert (change.applied, Target.limit) == (changes, 2 if changes else 1)
    change.revert()
    assert Target.limit == 1
    assert (
        change.unneeded_here()
        == {
            "what is absent": "nemo_toolkit is not installed.",
            "what needs it": None,
            "what does not need it": "megatron-core 0.19.2 does not need it: it is mended.",
        }[of]
    )


def test_a_patch_is_refused_where_another_version_is_installed_than_it_was_written_for(monkeypatch):
    pretend(monkeypatch, {"torch": "2.9.1", "megatron-core": "0.19.2"})
    change = patch("test", why="a test", until="its end", of={"megatron-core": ("0.15.3",)})(
        lambda: iter([Change(Target, "limit", 2)])
    )
    with pytest.raises(ValueError, match=r"'test' was written for megatron-core 0\.15\.3, and 0\.19\.2 is installed"):
        change.apply()
    assert Target.limit == 1


def test_every_patch_of_a_library_names_the_versions_it_was_written_for():
    from nemo_pre.compat import (
        checkpoints,
        first_use,
        learning_rates,
        progress,
        safe_reading,
        telemetry,
        unified_memory,
    )

    modules = (checkpoints, learning_rates, progress, safe_reading, unified_memory, first_use)
    patches = [*cpu_backend.patches(), *(each for module in modules for each in module.PATCHES)]
    for each in [*patches, telemetry.no_telemetry]:
        assert each.of and set(each.of) <= set(versions.SUPPORTED), each
        for package, known in each.of.items():
            assert set(known) <= set(versions.SUPPORTED[package]), each


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
