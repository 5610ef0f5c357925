"""What prepared data consists of: ``nemo-pre data stats``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_pre.options import Count, PathText
from nemo_pre.run_files.outputs import make_output_folder


def stats(
    path: PathText,
    tokenizer: PathText | None = None,
    visual_tokens: int = 576,
    sequence_length: int = 4096,
    dp: int = 8,
    workers: int = 4,
    processes: Count | None = None,
    out: PathText | None = None,
) -> dict[str, Any]:
    """Counts what the prepared data in the directory PATH consists of, and advises on shards.

    Per split: samples, bytes, samples per source; the distributions of characters and tokens of text, of the length
    in the decoder (text tokens and visual_tokens per image; the chat template not counted) and the share longer than
    sequence_length; of turns, of images per sample and of image sizes. Tokens are counted by the tokenizer of the
    directory tokenizer=DIR, or the one that lies with the data. The advice on shards is for dp data-parallel ranks
    with workers loader processes each. out=DIR gets stats.json and stats.png (null: the data directory stays as it
    is and nothing is written). processes share the work (null: one per core).

    Raises:
        ValueError: the manifest or the tokenizer cannot be read, or an option is out of range.
    """
    from data_prep.stats.count import count
    from data_prep.stats.plot import plot
    from data_prep.stats.summary import summarise, table

    options = {"visual_tokens": visual_tokens, "sequence_length": sequence_length, "dp": dp, "workers": workers}
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1")
    if out is not None:
        make_output_folder("out", out)
    counted = count(Path(path), tokenizer, visual_tokens, processes)
    result = summarise(counted, sequence_length, dp, workers)
    print(table(result))
    if out is not None:
        directory = Path(out)
        (directory / "stats.json").write_text(json.dumps(result, indent=1) + "\n")
        plot(counted, directory / "stats.png")
        print(f"written to {directory / 'stats.json'} and {directory / 'stats.png'}")
    return result
