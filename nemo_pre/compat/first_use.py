"""A package that is imported when something of it is used, and not before. Imports nothing heavy itself."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from nemo_pre.compat.registry import patch

# importlib.util.LazyLoader runs a package for any name, also for the __file__ that torch's custom operators ask of
# every imported module.
USES = ("__all__", "__path__", "__version__")
RUNNING = threading.RLock()


class Later(ModuleType):
    """A package whose own file runs when the first name of it is used, or the first module in it imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in USES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        with RUNNING:  # another thread's first use may be under way
            if "_loader" in self.__dict__:
                self._run()
        return super().__getattribute__(name)

    def _run(self) -> None:
        """Run the package; one that fails is as it was, so that the next use tells the same error."""
        state, spec = self.__dict__, self.__spec__
        assert spec is not None
        before = dict(state)
        later, spec.loader, self.__path__ = spec.loader, state.pop("_loader"), state.pop("_path")
        try:
            spec.loader.exec_module(self)  # type: ignore[union-attr]
        except BaseException:
            state.clear()
            state.update(before)
            spec.loader = later
            raise


class LaterLoader:
    """Makes a :class:`Later` and keeps the package's own loader in it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Later(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        state = module.__dict__
        state.update(_loader=self._loader, _path=state.pop("__path__"))


class ThereLoader:
    """Gives a module that is there: the import of one in the package asks for the package's path, so that the package
    runs and imports the same module, before Python goes on to find it."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


class LaterFinder:
    """Finds one package and sees to it that importing it makes a :class:`Later`."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name in sys.modules and name.startswith(f"{self._package}."):
            return ModuleSpec(name, ThereLoader(sys.modules[name]))  # type: ignore[arg-type]
        if name != self._package or (spec := PathFinder.find_spec(name, path)) is None:
            return None
        spec.loader = LaterLoader(spec.loader)  # type: ignore[assignment]
        return spec

    def do(self) -> None:
        sys.meta_path.insert(0, self)  # type: ignore[arg-type]

    def undo(self) -> None:
        """A package that was imported meanwhile stays as it is: it runs at its first use."""
        sys.meta_path.remove(self)  # type: ignore[arg-type]


@patch(
    "wandb-at-first-use",
    why="megatron.core.timers imports Weights & Biases wherever it is installed: two of the eleven CPU seconds in"
    " which every process of a run starts, whether or not the run reports there.",
    until="megatron.core.timers imports wandb where a writer is one.",
    of={"megatron-core": ("0.15.3", "0.19")},
)
def wandb_at_first_use():
    yield LaterFinder("wandb")


PATCHES = [wandb_at_first_use]


def apply() -> None:
    """Apply this module's patches, which must happen before the first import of Megatron."""
    for each in PATCHES:
        each.apply()
