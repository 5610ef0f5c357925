"""Re-reading prepared data in full: ``nemo-pre data validate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_pre.options import Count, PathText
from nemo_pre.run_files.outputs import check_output_file


def validate(
    path: PathText,
    workers: Count | None = None,
    sample: Count | None = None,
    decode: bool = True,
    max_pixels: Count = 64_000_000,
    max_characters: Count = 32_768,
    tokenizer: PathText | None = None,
    max_tokens: Count = 4096,
    report: PathText | None = None,
) -> dict[str, Any]:
    """Re-reads the prepared data in the directory PATH and tells all that is wrong with it.

    Compared are files and checksums with the manifest, every tar with its index, every record with the schema and
    its images, and the splits with each other (the same image under the same question). Images are decoded in full, as
    training does, and those of one colour throughout are told; decode=false reads their headers only. An image of more
    than max_pixels is reported without being decoded, a sample of more than max_characters, too; with tokenizer=DIR
    (that of prepared data is DATA/tokenizer) also one of more than max_tokens text tokens, the chat template not
    counted. sample=N re-reads N samples drawn at random; checksums and comparisons between splits are then left out.
    workers are processes (null: one per core).
    report=FILE gets every finding with shard, key and reason as JSON, which is also what is returned.

    Exit code: 0 nothing found, 1 something found, 2 no prepared data there or an option out of range.

    Raises:
        ValueError: the manifest or the tokenizer cannot be read, or an option is out of range.
        SystemExit: with code 1, after everything is printed, if there are findings.
    """
    from data_prep.validate.check import check
    from data_prep.validate.content import Limits
    from data_prep.validate.findings import table

    if report is not None:
        check_output_file("report", report)
    limits = Limits(decode, max_pixels, max_characters, tokenizer, max_tokens)
    result = check(Path(path), limits, workers, sample)
    content = result.as_json()
    if report is not None:
        Path(report).write_text(json.dumps(content, indent=1) + "\n")
    print(table(result))
    if result.findings:
        raise SystemExit(1)
    return content
