"""What import-linter checks is the table of docs/architecture.md: it names every module, and can be broken."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

CLONE = Path(__file__).parents[2]
PACKAGES = ("nemo_pre", "recipes", "data_prep")
CONTRACTS = {
    contract["id"]: contract
    for contract in tomllib.loads((CLONE / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
}
OBJECTIVES = "nemo_pre.objectives.NAME"  # the table's row for objectives' folders, of any name
HEAVY = {"torch", "megatron", "nemo", "lightning", "transformers"}


def rows_of_table() -> list[set[str]]:
    """The modules and packages that each row of the table names, from the first row on."""
    section = (CLONE / "docs/architecture.md").read_text().split("## Who does what")[1].split("\n## ")[0]
    rows = []
    for cell in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE):
        names = set()
        for name in re.findall(r"`(.+?)`", cell):
            folder, _, members = name.rstrip("/}").replace("/{", "{").partition("{")
            names |= {f"{folder}.{member}" for member in members.split(",")} if members else {folder.replace("/", ".")}
        rows.append({name if name in PACKAGES else f"nemo_pre.{name}" for name in names})
    return rows


def rows_of_contract() -> list[set[str]]:
    """The modules and packages that each layer of the contract names, from the lowest on."""
    return [set(re.split(r"\s*[|:]\s*", layer)) for layer in reversed(CONTRACTS["rooms"]["layers"])]


def graph() -> grimp.ImportGraph:
    return grimp.build_graph(*PACKAGES, cache_dir=None, exclude_type_checking_imports=True)


def test_the_table_and_the_contract_name_the_same_rooms_in_the_same_order():
    table = rows_of_table()
    assert [row for row in table if row != {OBJECTIVES}] == rows_of_contract()
    above = set().union(*table[table.index({OBJECTIVES}) + 1 :])
    assert set(CONTRACTS["objectives"]["forbidden_modules"]) == above


def test_every_module_is_in_a_room():
    rooms = set().union(*rows_of_contract())
    found = graph()
    folders = {name for name in found.find_children("nemo_pre.objectives") if found.find_children(name)}
    assert folders
    for module in found.modules - {"nemo_pre", "nemo_pre.objectives"}:
        parts = module.split(".")
        ancestors = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
        assert ancestors & (rooms | folders), f"{module} is in no row of docs/architecture.md's table"


def test_nobody_imports_the_folder_of_an_objective():
    found = graph()
    for folder in found.find_children("nemo_pre.objectives"):
        inside = {folder, *found.find_descendants(folder)}
        if len(inside) > 1:
            for module in inside:
                assert found.find_modules_that_directly_import(module) <= inside


def test_what_the_command_line_asks_before_a_run_imports_no_torch():
    rooms = ("options", "config", "run_files", "planner", "checks", "cli", "slurm")
    not_asked = {"nemo_pre.slurm.all_reduce"}  # a measurement of its own, on ranks
    modules = sorted(
        {
            ".".join(file.relative_to(CLONE).with_suffix("").parts).removesuffix(".__init__")
            for room in rooms
            for file in [*CLONE.glob(f"nemo_pre/{room}.py"), *CLONE.glob(f"nemo_pre/{room}/**/*.py")]
        }
        - not_asked
    )
    program = (
        f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
        f"print(sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=CLONE)
    assert done.stdout.splitlines()[-1] == "[]"


def test_everything_above_nemos_side_of_the_table_imports_where_neither_nemo_nor_lightning_is():
    """Two packages that cannot be imported stand for two that are not installed."""
    found, table = graph(), rows_of_table()
    here = next(number for number, row in enumerate(table) if "nemo_pre.callbacks" in row)
    rooms = set().union(*table[:here]) - {OBJECTIVES}
    rooms |= {name for name in found.find_children("nemo_pre.objectives") if found.find_children(name)}
    modules = sorted(
        module
        for module in found.modules
        if module in rooms or any(module.startswith(f"{room}.") for room in rooms)
        if not module.startswith("nemo_pre.huggingface.remote_code.") and not module.endswith("__main__")
    )
    assert len(modules) > 150
    program = (
        "import importlib, sys\n"
        "for absent in ('nemo', 'nemo_run', 'lightning', 'pytorch_lightning'): sys.modules[absent] = None\n"
        "from nemo_pre.compat import unified_memory; unified_memory.apply()\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "print('imported')"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=CLONE)
    assert done.stdout.endswith("imported\n"), done.stderr[-2000:]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages and their contracts, to be broken."""
    directory = tmp_path_factory.mktemp("copy")
    for package in PACKAGES:
        shutil.copytree(CLONE / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CLONE / "pyproject.toml", directory)
    return directory


@pytest.mark.parametrize(
    "module, planted, broken",
    [
        ("nemo_pre/config/schema.py", "import nemo_pre.train", CONTRACTS["rooms"]),
        ("nemo_pre/run_files/metrics.py", "def late(): from nemo_pre.plots import plot_run", CONTRACTS["rooms"]),
        ("nemo_pre/objectives/pre/head.py", "import nemo_pre.neva.model", CONTRACTS["objectives"]),
        ("nemo_pre/data/manifest.py", "import nemo_pre.data.shards", CONTRACTS["circles"]),
        ("nemo_pre/data/features.py", "import lightning.pytorch", CONTRACTS["framework"]),
        ("nemo_pre/planner/load.py", "def late(): import torch", CONTRACTS["arithmetic"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value["id"],
)
def test_a_planted_import_is_found(copy, module, planted, broken):
    file = copy / module
    was = file.read_text()
    file.write_text(f"{was}\n{planted}\n")
    try:
        done = subprocess.run(
            [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
            + ["--no-cache", "--contract", broken["id"]],
            capture_output=True,
            text=True,
            cwd=copy,
            env={"PATH": "", "COLUMNS": "200"},
        )
    finally:
        file.write_text(was)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{broken['name']} BROKEN" in done.stdout
