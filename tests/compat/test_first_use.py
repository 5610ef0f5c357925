"""A package that is found but not run until something of it is used."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_pre.compat.first_use import LaterFinder


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package ``used_later`` with a module, which count their runs in a file; found by the finder in test."""
    folder = tmp_path / "used_later"
    folder.mkdir()
    count = f"with open({str(tmp_path / 'runs')!r}, 'a') as file:\n    file.write('x')\n"
    (folder / "__init__.py").write_text(f"{count}from used_later.inside import what\n__version__ = '3'\n")
    (folder / "inside.py").write_text(f"{count}what = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    finder = LaterFinder("used_later")
    finder.do()
    yield str(tmp_path / "runs")
    finder.undo()
    for name in [name for name in sys.modules if name.startswith("used_later")]:
        del sys.modules[name]


def runs(file: str) -> int:
    return len(Path(file).read_text()) if Path(file).exists() else 0


def test_importing_it_and_looking_at_it_does_not_run_it(package: str) -> None:
    import used_later

    assert used_later.__file__.endswith("__init__.py") and used_later.__spec__.name == "used_later"
    assert not hasattr(used_later, "__wrapped__") and repr(used_later)
    assert runs(package) == 0


@pytest.mark.parametrize(
    "use, found",
    [
        ("import used_later; found = used_later.what", 7),
        ("from used_later import what as found", 7),
        ("import used_later; found = used_later.__version__", "3"),
        ("import used_later; import used_later.inside; found = used_later.what", 7),
        ("from used_later.inside import what as found", 7),
    ],
)
def test_the_first_use_runs_it_once(package: str, use: str, found: object) -> None:
    names: dict[str, object] = {}
    exec(f"{use}\nimport used_later", names)
    assert names["found"] == found and runs(package) == 2, "each of the two once"
    package_there, inside = sys.modules["used_later"], sys.modules["used_later.inside"]
    assert package_there.__path__ and package_there.inside is inside and inside.__spec__.loader.name == inside.__name__


def test_what_it_does_not_have_is_said_as_of_any_module(package: str) -> None:
    import used_later

    for _ in range(2):
        with pytest.raises(AttributeError, match="module 'used_later' has no attribute 'nothing'"):
            _ = used_later.nothing
    with pytest.raises(ImportError, match="nothing"):
        from used_later import nothing  # noqa: F401


def test_a_package_that_fails_tells_its_error_at_every_use(package: str, tmp_path: Path) -> None:
    (tmp_path / "used_later" / "__init__.py").write_text("raise ImportError('needs another version')\n")
    import used_later

    for _ in range(2):
        with pytest.raises(ImportError, match="needs another version"):
            _ = used_later.what


def test_two_threads_use_it_first(package: str, tmp_path: Path) -> None:
    (tmp_path / "used_later" / "__init__.py").write_text("import time\ntime.sleep(0.3)\nwhat = 7\n")
    import used_later

    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(used_later.what)) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == [7, 7]


def test_megatrons_import_does_not_run_weights_and_biases_and_a_use_does() -> None:
    program = (
        "from nemo_pre.launch.environment import prepare_environment\n"
        "prepare_environment('cpu')\n"
        "import sys, megatron.core.timers\n"
        "assert 'wandb' in sys.modules and 'wandb.sdk' not in sys.modules\n"
        "import wandb\n"
        "assert callable(wandb.init) and 'wandb.sdk' in sys.modules\n"
    )
    pytest.importorskip("wandb")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
