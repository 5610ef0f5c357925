"""examples/megatron_core.py trains the digits at PP2, goes on at TP2-SP and at one rank from what PP2 saved, and is
exported as a run of NeVA is."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.backend import BACKEND, CORE
from tests.ranks import run_on_standing_ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "megatron_core.py"
pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(BACKEND != CORE, reason="rates by module need Megatron-Core 0.19: make test-core"),
]
WORDS = (
    "experiment=digits_tiny_pre",
    "platform=cpu",
    "trainer.max_steps=4",
    "trainer.checkpoint_every=2",
    "trainer.global_batch_size=8",
    "optim.lr_heads=3e-3",
    "optim.eps=1e-4",  # or a moment that is nothing but rounding makes steps of its own
)


def train(words: list[str]) -> dict[str, float]:
    """On a rank: the example as it stands."""
    from nemo_pre.checks.run import check_options
    from nemo_pre.config.compose import compose_run

    run = compose_run(words)
    check_options(run)
    metrics: dict[str, float] = example().train(run)
    return metrics


def example() -> Any:
    spec = importlib.util.spec_from_file_location("megatron_core_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_is_short_and_knows_neither_lightning_nor_nemo():
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) < 150
    assert not [line for line in text.splitlines() if line.strip().startswith(("import nemo.", "from nemo."))]
    assert "lightning" not in text.replace("Lightning nor NeMo", "")


def test_it_trains_saves_resumes_at_another_layout_and_is_exported_as_a_neva_run(tmp_path, digits):
    from nemo_pre.huggingface.exporter import export_checkpoint
    from nemo_pre.huggingface.importer import import_checkpoint

    def words(layout: str, folder: str) -> list[str]:
        return [*WORDS, f"parallel={layout}", f"data.path={digits}", f"output_dir={tmp_path / folder}"]

    pipeline = run_on_standing_ranks(train, 2, words("pp2", "pp2"), timeout=300)
    assert pipeline[0] == pipeline[1]
    checkpoints = tmp_path / "pp2" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step=2", "step=4"]
    for layout, ranks in (("tp2_sp", 2), ("single", 1)):  # steps 3 and 4 at another layout
        shutil.copytree(checkpoints / "step=2", tmp_path / layout / "checkpoints" / "step=2")
        resumed = run_on_standing_ranks(train, ranks, words(layout, layout), timeout=300)
        for name in ("loss", "pre/loss"):
            assert resumed[0][name] == pytest.approx(pipeline[0][name], rel=1e-4), (layout, name)

    exported = export_checkpoint(str(tmp_path / "pp2"), str(tmp_path / "hf"))
    # What import writes is a NeVA run's format, whoever wrote what is imported.
    neva = import_checkpoint(str(exported), str(tmp_path / "neva"))
    again = export_checkpoint(str(neva), str(tmp_path / "again"))
    files = {path.name for path in exported.iterdir()}
    assert files == {path.name for path in again.iterdir()}
    first, second = (load_file(path / "model.safetensors") for path in (exported, again))
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    assert not [name for name in first if "pre_heads" in name]
    assert json.loads((exported / "config.json").read_text()) == json.loads((again / "config.json").read_text())
