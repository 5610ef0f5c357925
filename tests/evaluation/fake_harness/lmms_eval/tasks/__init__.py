from pathlib import Path

import yaml


class TaskManager:
    def __init__(self, verbosity="INFO", include_path=None):
        print("lmms-eval says this and that")
        self.task_index = {}
        for folder in [Path(__file__).parent, *([Path(include_path)] if include_path else [])]:
            for path in folder.rglob("*.yaml"):
                config = yaml.safe_load(path.read_text())
                if isinstance(config.get("task"), list):
                    self.task_index[config["group"]] = {"type": "group", "task": -1, "yaml_path": str(path)}
                else:
                    self.task_index[config["task"]] = {"type": "task", "yaml_path": str(path)}
        self.all_tasks = sorted(self.task_index)
