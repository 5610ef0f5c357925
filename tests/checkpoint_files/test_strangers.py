"""A stranger's checkpoint runs no code, whichever of its files it hides it in, and is refused in one sentence."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from nemo_pre.checkpoint_files.checksums import ATTRIBUTE
from nemo_pre.checkpoint_files.inspection import inspect
from nemo_pre.checkpoint_files.metadata import read_metadata
from nemo_pre.checkpoint_files.pickles import UnsafePickle, check_extra_state, load_metadata, load_plain
from nemo_pre.compat import safe_reading
from nemo_pre.huggingface.exporter import export_checkpoint
from nemo_pre.huggingface.importer import import_checkpoint
from nemo_pre.huggingface.loading import needs_own_code, own_files
from nemo_pre.inference import generate
from nemo_pre.run_files.checkpoints import SIZES
from nemo_pre.run_files.checksums import CHECKSUMS
from nemo_pre.verbs.diagnose import diagnose_run
from tests.huggingface.tiny import tiny_llava


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists()


def attack(marker):
    return Calls(os.system, f"touch {marker}")


def inner(marker):
    """Bytes that torch loads without weights_only where a pickle asks it to."""
    content = io.BytesIO()
    torch.save(attack(marker), content)
    return content.getvalue()


ATTACKS = {
    "system": attack,
    "eval": lambda marker: Calls(eval, f"open({str(marker)!r}, 'w')"),
    "in a container": lambda marker: {"state_dict_metadata": [attack(marker)]},
    "torch's own": lambda marker: Calls(torch.storage._load_from_bytes, inner(marker)),
    "torch's attribute": lambda marker: Calls(torch.load, "weights.pt"),
    "getattr": lambda marker: Calls(getattr, "a text", "upper"),
    "a module": lambda marker: Calls(__import__, "antigravity"),
}


@pytest.mark.parametrize("kind", ATTACKS)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_metadata_call_nothing(marker, kind, protocol):
    content = pickle.dumps(ATTACKS[kind](marker), protocol)
    with pytest.raises(UnsafePickle, match=r"^\.metadata names .*, which could run code"):
        load_metadata(io.BytesIO(content), ".metadata")


@pytest.mark.parametrize("kind", ATTACKS)
def test_neither_does_what_torch_saved(marker, kind):
    content = io.BytesIO()
    torch.save({"weights": ATTACKS[kind](marker)}, content)
    content.seek(0)
    with pytest.raises(UnsafePickle, match=r"^common\.pt names .*, which could run code") as error:
        load_plain(content, "common.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [kind for kind in ATTACKS if kind != "torch's own"])
def test_nor_the_state_of_an_fp8_module(marker, kind):
    with pytest.raises(UnsafePickle, match="names"):
        check_extra_state(pickle.dumps(ATTACKS[kind](marker)), "layer._extra_state")


def test_a_tensor_in_the_state_of_an_fp8_module_is_no_door(marker):
    with pytest.raises(ValueError, match="cannot be read"):
        check_extra_state(pickle.dumps(ATTACKS["torch's own"](marker)), "layer._extra_state")


def test_the_state_of_an_fp8_module_is_scales_and_a_recipe(monkeypatch):
    recipes = types.ModuleType("transformer_engine.common.recipe")
    for name in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, recipes.__name__, recipes)
    recipes.DelayedScaling = type("DelayedScaling", (), {"__module__": recipes.__name__})
    state = {"scale_fwd": torch.ones(3), "recipe": recipes.DelayedScaling(), "extra_fp8_variables": {"a": (1, "b")}}
    check_extra_state(pickle.dumps(state), "layer._extra_state")
    recipes.run = os.system  # what the module merely imports is none of its own
    stolen = (
        pickle.dumps(recipes.DelayedScaling).replace(b"DelayedScaling", b"run").replace(b"\x8c\x0erun", b"\x8c\x03run")
    )
    with pytest.raises(ValueError):
        check_extra_state(stolen, "layer._extra_state")


def test_classes_of_metadata_are_not_changed_by_a_pickle():
    before = dict(vars(Metadata))
    # Metadata's class, then BUILD with (None, {"version": 1}), which sets an attribute of it.
    content = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x07\x00\x00\x00versionK\x01s\x86b."
    try:
        with pytest.raises(UnsafePickle, match="changes Metadata"):
            load_metadata(io.BytesIO(content), ".metadata")
    finally:
        Metadata.version = before["version"]


def test_members_of_enumerations_are_read_however_python_wrote_them():
    from torch.distributed.checkpoint.planner import WriteItemType

    for written in (WriteItemType.SHARD, Calls(getattr, WriteItemType, "SHARD")):
        assert load_metadata(io.BytesIO(pickle.dumps(written)), ".metadata") is WriteItemType.SHARD


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04", b"yyyyyyyyyy", random.Random(0).randbytes(100), b"\x80\x04K\x01.", b"N.", pickle.dumps({1: 2})],
    ids=["empty", "cut", "text", "random", "a number", "nothing", "a dictionary"],
)
def test_metadata_that_are_none_are_damaged(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata (cannot be read|names)"):
        read_metadata(tmp_path)


# --- whole checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("imported")
    import_checkpoint(str(tiny_llava(root / "hf")), str(root / "checkpoint"))
    return root / "checkpoint"


@pytest.fixture
def strangers(imported, tmp_path) -> Path:
    """A checkpoint that vouches for nothing, as somebody's who changed it."""
    copy = shutil.copytree(imported, tmp_path / "stranger")
    for name in (CHECKSUMS, SIZES):
        (copy / name).unlink(missing_ok=True)
    metadata = read_metadata(copy / "weights")
    for place in metadata.storage_data.values():
        delattr(place, ATTRIBUTE)
    (copy / "weights" / ".metadata").write_bytes(pickle.dumps(metadata))
    return copy


def in_metadata(weights, marker):
    (weights / ".metadata").write_bytes(pickle.dumps(attack(marker)))


def in_metadata_beside_the_rest(weights, marker):
    found = pickle.loads((weights / ".metadata").read_bytes())
    found.planner_data = attack(marker)
    (weights / ".metadata").write_bytes(pickle.dumps(found))


def in_common_state(weights, marker):
    torch.save({"content_metadata": attack(marker)}, weights / "common.pt")


def in_common_state_of_the_old_format(weights, marker):
    (weights / "common.pt").write_bytes(pickle.dumps(attack(marker)))


def in_the_model_optimizers_state(weights, marker):
    (weights / "modelopt_state").mkdir()
    torch.save(attack(marker), weights / "modelopt_state" / "common.pt")


def in_another_format(weights, marker):
    (weights / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "common_backend": "torch"}))


def in_an_object(weights, marker):
    content = io.BytesIO()
    torch.save([attack(marker)], content)
    add_object(weights, "module.decoder.final._extra_state/shard_0_1", content.getvalue())


def in_an_objects_state(weights, marker):
    content = io.BytesIO()
    state = torch.frombuffer(bytearray(pickle.dumps(attack(marker))), dtype=torch.uint8)
    torch.save([state], content)
    add_object(weights, "module.decoder.final._extra_state/shard_0_1", content.getvalue())


def in_a_file_elsewhere(weights, marker):
    (weights.parent.parent / "elsewhere").write_bytes(pickle.dumps(attack(marker)))
    found = pickle.loads((weights / ".metadata").read_bytes())
    for place in found.storage_data.values():
        place.relative_path = "../../elsewhere"
    (weights / ".metadata").write_bytes(pickle.dumps(found))


def add_object(weights, name, content):
    found = pickle.loads((weights / ".metadata").read_bytes())
    (weights / "__1_0.distcp").write_bytes(content)
    found.state_dict_metadata[name] = BytesStorageMetadata()
    found.storage_data[MetadataIndex(name)] = _StorageInfo("__1_0.distcp", 0, len(content))
    (weights / ".metadata").write_bytes(pickle.dumps(found))


HIDDEN = [
    in_metadata,
    in_metadata_beside_the_rest,
    in_common_state,
    in_common_state_of_the_old_format,
    in_the_model_optimizers_state,
    in_another_format,
    in_an_object,
    in_an_objects_state,
    in_a_file_elsewhere,
]


@pytest.mark.parametrize("hide", HIDDEN, ids=lambda hide: hide.__name__)
def test_every_verb_refuses_a_checkpoint_with_code_in_a_file(strangers, marker, hide, tmp_path):
    from nemo_pre.callbacks.resume import start_point
    from nemo_pre.config.run import RunConfig

    hide(strangers / "weights", marker)
    run = RunConfig(output_dir=str(tmp_path / "run"), init_from=str(strangers))
    for verb in (
        lambda: export_checkpoint(str(strangers), str(tmp_path / "out")),
        lambda: generate(str(strangers), prompt="?", platform="cpu"),
        lambda: diagnose_run(str(strangers), str(tmp_path / "scratch")),
        lambda: start_point(run, {}),
    ):
        with pytest.raises(UnsafePickle, match=str(strangers / "weights")) as error:
            verb()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_tensors_of_which_one_is_a_pickle_are_refused_in_a_sentence(strangers, marker, tmp_path):
    """torch reads them with weights_only=True."""
    (strangers / "weights" / "__0_0.distcp").write_bytes(pickle.dumps(attack(marker)) + b"\0" * (1 << 22))
    with pytest.raises(ValueError, match=r"cannot be read from .*stranger: ") as error:
        export_checkpoint(str(strangers), str(tmp_path / "out"))
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_checksums_is_taken_and_that_is_said(strangers, tmp_path, caplog):
    export_checkpoint(str(strangers), str(tmp_path / "out"))
    assert f"{strangers} has no checksums: its bytes are taken as they are, not verified." in caplog.messages
    assert not inspect(strangers).verified


def test_what_a_checkpoint_needs_is_known(imported):
    """The metadata of torch and of Megatron, and a state with an order."""
    found = inspect(imported)
    assert (found.damage, found.danger, found.verified) == ("", "", True)
    content = io.BytesIO()
    torch.save({"loops": OrderedDict(a=1), "tensors": [torch.ones(2)], "text": "x"}, content)
    content.seek(0)
    assert load_plain(content, "common.pt")["loops"] == {"a": 1}


# --- the second wall: the readers of torch and Megatron -------------------------------------------------------------


@pytest.fixture
def patched():
    patches = safe_reading.PATCHES[:3]  # the fourth is NeMo's
    for each in patches:
        each.apply()
    yield
    for each in reversed(patches):
        each.revert()


@pytest.mark.usefixtures("patched")
def test_the_readers_of_torch_and_megatron_call_nothing_either(strangers, marker, monkeypatch):
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    weights = strangers / "weights"
    assert FileSystemReader(weights).read_metadata().state_dict_metadata
    assert TorchCommonLoadStrategy().load_common(weights)["content_metadata"]
    item = types.SimpleNamespace(dest_index=MetadataIndex("module.x._extra_state/shard_0_1"))
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict = {}
    planner.load_bytes(item, io.BytesIO(saved([torch.ones(2)])))
    assert planner.state_dict[item.dest_index.fqn][0].tolist() == [1, 1]
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    in_metadata(weights, marker)
    in_common_state(weights, marker)
    for read in (
        lambda: FileSystemReader(weights).read_metadata(),
        lambda: TorchCommonLoadStrategy().load_common(weights),
        lambda: planner.load_bytes(item, io.BytesIO(saved([attack(marker)]))),
    ):
        with pytest.raises(UnsafePickle, match="which could run code"):
            read()


def saved(value):
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


@pytest.mark.parametrize(
    ("met", "told"),
    [
        (pickle.UnpicklingError("Weights only load failed"), True),
        (RuntimeError("PytorchStreamReader failed reading zip archive"), True),
        (OSError("Input/output error"), False),  # after which a restart may go well
        (RuntimeError("out of memory"), False),
    ],
    ids=repr,
)
def test_what_a_rank_met_in_a_broken_file_is_told_without_its_stack(met, told):
    class Failed(BaseException):
        failures = {1: (met, None)}

    error = RuntimeError("every rank's stack")
    error.__context__ = Failed()
    assert safe_reading.unreadable(error) is (met if told else None)
    assert safe_reading.unreadable(RuntimeError()) is None


# --- Hugging Face directories ---------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path) -> Path:
    """What an export leaves of a model that needs code, without its weights."""
    directory = tmp_path / "exported"
    directory.mkdir()
    for path in own_files("spatial_llava").values():
        shutil.copy(path, directory)
    classes = {"AutoConfig": "configuration_spatial_llava.SpatialLlavaConfig"}
    (directory / "config.json").write_text(json.dumps({"model_type": "spatial_llava", "auto_map": classes}))
    return directory


def change_a_file(directory, marker):
    with (directory / "configuration_spatial_llava.py").open("a") as file:
        file.write(f"\nopen({str(marker)!r}, 'w')\n")


def add_a_file(directory, marker):
    (directory / "other.py").write_text(f"open({str(marker)!r}, 'w')\n")


def name_a_repository(directory, marker):
    (directory / "config.json").write_text(
        json.dumps({"model_type": "spatial_llava", "auto_map": {"AutoConfig": "somebody/code--modeling.Config"}})
    )


def in_the_processors_config(directory, marker):
    (directory / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "other.Processor"}}))
    add_a_file(directory, marker)


@pytest.mark.parametrize("change", [change_a_file, add_a_file, name_a_repository, in_the_processors_config])
def test_diagnose_runs_no_code_of_a_directory_that_is_not_ours(exported, marker, change):
    from nemo_pre.diagnostics.huggingface import HuggingFaceModel

    assert needs_own_code(exported)
    change(exported, marker)
    with pytest.raises(ValueError, match="is loaded with code of its own"):
        HuggingFaceModel(exported, background=None)
    assert needs_own_code(exported, trusted=True)


def test_a_directory_without_code_runs_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert not needs_own_code(tmp_path)
