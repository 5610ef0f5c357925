"""Readers of checkpoints that call nothing which a file names; a second wall behind ``checkpoint_files``."""

from __future__ import annotations

import functools
import os
import pickle
from pathlib import Path
from typing import Any

from nemo_pre.compat.registry import Change, patch


@patch(
    "metadata-of-known-classes",
    why="torch unpickles a checkpoint's .metadata with pickle.load, which calls whatever it names.",
    until="FileSystemReader.read_metadata reads with an unpickler that knows the classes of metadata alone.",
    of={"torch": ("2.9", "2.11")},
)
def metadata_of_known_classes():
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    from nemo_pre.checkpoint_files.metadata import read_metadata

    original = FileSystemReader.read_metadata

    @functools.wraps(original)
    def reading(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("rank") is not None:
            raise ValueError(f"{self.path} has metadata of single ranks, which nemo-pre does not write.")
        found = read_metadata(self.path)
        if getattr(found, "storage_meta", None) is None:
            found.storage_meta = StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found

    yield Change(FileSystemReader, "read_metadata", reading)


@patch(
    "objects-without-code",
    why="torch unpickles a checkpoint's objects that are no tensors with weights_only=False, and Transformer Engine"
    " those in its modules' extra state with pickle.loads.",
    until="DefaultLoadPlanner.load_bytes loads with weights_only=True, and Transformer Engine's set_extra_state too.",
    of={"torch": ("2.9", "2.11")},
)
def objects_without_code():
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    original = DefaultLoadPlanner.load_bytes

    @functools.wraps(original)
    def loading(self: Any, read_item: Any, value: Any) -> None:
        from nemo_pre.checkpoint_files.inspection import check_object

        name = read_item.dest_index.fqn
        check_object(value.getvalue(), name, name)
        value.seek(0)
        original(self, read_item, value)

    yield Change(DefaultLoadPlanner, "load_bytes", loading)


@patch(
    "common-state-without-code",
    why="Megatron loads common.pt with torch's default, which an environment variable turns into weights_only=False.",
    until="TorchCommonLoadStrategy.load_common says weights_only=True.",
    of={"megatron-core": ("0.15.3",)},
    unneeded={"megatron-core 0.19": "it writes no common.pt"},
)
def common_state_without_code():
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy

    original = TorchCommonLoadStrategy.load_common

    @functools.wraps(original)
    def loading(self: Any, checkpoint_dir: str | os.PathLike[str]) -> Any:
        from nemo_pre.checkpoint_files.pickles import load_plain

        path = Path(checkpoint_dir) / COMMON_STATE_FNAME
        if not path.is_file():
            return original(self, checkpoint_dir)
        with path.open("rb") as file:
            return load_plain(file, path)

    yield Change(TorchCommonLoadStrategy, "load_common", loading)


@patch(
    "a-sentence-for-what-cannot-be-loaded",
    why="NeMo answers a file of a checkpoint that torch refuses with the stack of every rank, and with advice on"
    " options that nemo-pre has not.",
    until="MegatronStrategy.load_checkpoint passes on what a rank met.",
    of={"nemo_toolkit": ("2.7.3",)},
)
def a_sentence_for_what_cannot_be_loaded():
    from nemo.lightning.pytorch.strategies import MegatronStrategy

    original = MegatronStrategy.load_checkpoint

    @functools.wraps(original)
    def loading(self: Any, checkpoint_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, checkpoint_path, *args, **kwargs)
        except RuntimeError as error:
            cause = unreadable(error)
            if cause is None:
                raise
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
            raise ValueError(f"{checkpoint_path} cannot be loaded: {reason}.") from error

    yield Change(MegatronStrategy, "load_checkpoint", loading)


def unreadable(error: BaseException) -> BaseException | None:
    """What a rank met in a file that is not what it should be; None where the error has another reason, such as a disk
    that does not answer, after which a restart may go well."""
    failures = getattr(error.__context__, "failures", None) or {}
    for cause, _ in failures.values():
        broken = isinstance(cause, pickle.UnpicklingError | EOFError | ValueError)
        if broken or "PytorchStreamReader" in str(cause):
            return cause
    return None


PATCHES = [
    metadata_of_known_classes,
    objects_without_code,
    common_state_without_code,
    a_sentence_for_what_cannot_be_loaded,
]


def apply() -> None:
    """Apply the patches of this module; a second call does nothing."""
    for each in PATCHES:
        each.apply()


def revert() -> None:
    """Restore what was there before :func:`apply`."""
    for each in reversed(PATCHES):
        each.revert()
