"""What lmms-eval knows of a task before it runs.

``python -m nemo_pre.evaluation.task_index FOLDER NAME ...`` runs where lmms-eval is installed and prints JSON; FOLDER
has further tasks and may be empty.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

MARK = "task index: "  # lmms-eval's own messages go to the same output
OTHER_DATA = re.compile(r"""load_dataset\(\s*["']([^"']+)["'](?:,\s*["']([^"']+)["'])?""")
ASKS_A_MODEL = re.compile(r"API_KEY|llm_judge")


def describe_tasks(names: list[str], include_path: str | None) -> dict[str, Any]:
    """``tasks``: by name, the leaves with their data sets ``[path, configuration]`` and whether the folder's code
    can ask a language model; ``unknown``: names that are no tasks; ``known``: how many there are."""
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(verbosity="ERROR", include_path=include_path)
    known = set(manager.all_tasks)
    return {
        "tasks": {
            name: [_describe(leaf, manager) for leaf in _leaves(name, manager)] for name in names if name in known
        },
        "unknown": [name for name in names if name not in known],
        "known": len(known),
    }


def _leaves(name: str, manager: Any) -> list[str]:
    """A task by itself, or those of a group or tag."""
    entry = manager.task_index[name]
    if entry["type"] in ("task", "python_task"):
        return [name]
    members = entry["task"] if isinstance(entry["task"], list) else _config(name, manager)["task"]
    names = [member if isinstance(member, str) else member.get("task") for member in members]
    return [leaf for member in names if member in manager.task_index for leaf in _leaves(member, manager)]


def _config(name: str, manager: Any) -> dict[str, Any]:
    from lmms_eval.utils import load_yaml_config

    config: dict[str, Any] = load_yaml_config(manager.task_index[name]["yaml_path"], mode="simple")
    return config


def _describe(name: str, manager: Any) -> dict[str, Any]:
    config = _config(name, manager)
    code = "\n".join(path.read_text() for path in Path(manager.task_index[name]["yaml_path"]).parent.glob("*.py"))
    path, options = str(config.get("dataset_path", "")), config.get("dataset_kwargs") or {}
    local = "data_files" in options or Path(path).exists()
    data = [] if local or not path else [(path, config.get("dataset_name"))]
    # Some tasks fetch their images from another configuration of the same repository.
    data += [(other, part or None) for other, part in OTHER_DATA.findall(code) if other == path]
    return {"task": name, "data": list(dict.fromkeys(data)), "asks_a_model": bool(ASKS_A_MODEL.search(code))}


if __name__ == "__main__":
    folder, *wanted = sys.argv[1:]
    print(MARK + json.dumps(describe_tasks(wanted, folder or None)))
