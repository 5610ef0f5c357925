from pathlib import Path

import yaml


def load_yaml_config(path, mode="full"):
    return yaml.safe_load(Path(path).read_text())


class Collator:
    """Batches of entries with equal settings (the second field), each sorted."""

    def __init__(self, entries, key, grouping):
        assert grouping
        self.entries, self.key, self.order = entries, key, []

    def get_batched(self, n):
        groups = {}
        for number, entry in enumerate(self.entries):
            groups.setdefault(str(sorted(entry[1].items())), []).append(number)
        for numbers in groups.values():
            numbers.sort(key=lambda number: self.key(self.entries[number]))
            self.order += numbers
            for start in range(0, len(numbers), n):
                yield [self.entries[number] for number in numbers[start : start + n]]

    def get_original(self, answers):
        return [answer for _, answer in sorted(zip(self.order, answers, strict=True))]
