"""What validation can find, and how it is told."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REASONS = {
    "missing_file": "named in the manifest, but not there",
    "stray_file": "lies with the data, but is not named in the manifest",
    "shard_twice": "named twice in the manifest",
    "sample_count": "the manifest's sums do not add up",
    "wrong_size": "not the size the manifest states",
    "wrong_checksum": "not the bytes the manifest states",
    "tar_truncated": "the tar ends early",
    "tar_header": "a header of the tar is corrupt",
    "tar_trailing_data": "the tar goes on after its end",
    "duplicate_key": "a key appears twice in a tar",
    "dot_in_key": "WebDataset ends a key at its first dot",
    "index_unreadable": "the index is not one",
    "index_order": "the index lists the members in another order than the tar",
    "index_disagrees": "the index and the tar have other members",
    "unreadable_sample": "what the training's reader refuses",
    "broken_text": "text that has no UTF-8",
    "turns": "not human, gpt, human, gpt, ... with text",
    "empty_answer": "nothing to learn from",
    "image_without_tag": "an image that no question shows",
    "more_tags_than_images": "questions show images that are not there",
    "fewer_tags_than_images": "some images are shown, others not",
    "image_members": "the images are not numbered from 0, or not as many as the record names",
    "image_undecodable": "damaged or cut",
    "image_too_large": "more pixels than max_pixels, or than training decodes; not decoded",
    "one_colour": "all of its pixels are the same: nothing can be seen",
    "mask_undecodable": "damaged or cut",
    "mask_size": "not the size of the image",
    "too_long": "more text than max_characters or max_tokens",
    "unknown_text": "characters that the tokenizer does not know",
    "duplicate_across_splits": "the same image and question in an earlier split",
}
EXAMPLES = 3  # of every reason, in the table


@dataclass(frozen=True)
class Finding:
    """``key`` is empty and ``position`` -1 where it is about the whole shard."""

    shard: str
    key: str
    reason: str
    detail: str
    position: int = -1

    def __post_init__(self) -> None:
        assert self.reason in REASONS, self.reason


@dataclass(frozen=True)
class Report:
    path: Path
    splits: dict[str, int]  # samples the manifest states
    shards: int
    checked: int  # samples re-read
    sampled: bool
    seconds: float
    findings: list[Finding]

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(finding.reason for finding in self.findings)
        return {reason: found[reason] for reason in REASONS if found[reason]}

    def as_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "clean": not self.findings,
            "splits": self.splits,
            "shards": self.shards,
            "samples_checked": self.checked,
            "sampled": self.sampled,
            "seconds": round(self.seconds, 3),
            "counts": self.counts,
            "findings": [asdict(finding) for finding in self.findings],
        }


def table(report: Report) -> str:
    """The report as a table for people: a line per reason, with the first examples under it."""
    total = sum(report.splits.values())
    lines = [
        f"{report.path}: {report.checked:,} of {total:,} samples in {report.shards} shards re-read "
        f"in {report.seconds:.1f} s, {len(report.findings):,} finding(s)"
    ]
    for reason, count in report.counts.items():
        lines.append(f"\n{count:>8,}  {reason}: {REASONS[reason]}")
        examples = [finding for finding in report.findings if finding.reason == reason][:EXAMPLES]
        lines += [f"{'':10}{' '.join(filter(None, (e.shard, e.key)))}: {e.detail}" for e in examples]
        if count > EXAMPLES:
            lines.append(f"{'':10}... and {count - EXAMPLES:,} more (all of them: report=FILE)")
    return "\n".join(lines)
