"""Every experiment becomes a NeVA config, with and without a GPU, on a machine without Transformer Engine."""

from __future__ import annotations

from typing import Any

import recipes
from tests.ranks import run_ranks


def describe(experiments: list[str]) -> dict[str, dict[str, Any]]:
    from nemo_pre.config.compose import compose_run
    from nemo_pre.neva.build import build_neva_config
    from nemo_pre.objectives.pre.term import PReTerm

    found = {}
    for name in experiments:
        run = compose_run([f"experiment={name}"])
        neva = build_neva_config(run, on_gpu=True)
        language = neva.language_transformer_config
        term = PReTerm(run.objective.pre)
        term.prepare(neva)
        heads = term.head_spec()
        found[name] = {
            "per_token": (neva.calculate_per_token_loss, language.calculate_per_token_loss),
            "fused_rope": language.apply_rope_fusion,
            "vocabulary": language.vocab_size % 128,
            "visual tokens": neva.vision_transformer_config.num_image_embeddings_per_tile,
            "layers": heads.layers,
            "head": (heads.input_width, heads.hidden_width, heads.output_width),
        }
    return found


def test_every_experiment_becomes_a_model_config():
    experiments = recipes.choices("experiment")
    (found,) = run_ranks(describe, 1, experiments)
    assert set(found) == set(experiments) and len(found) >= 12
    for name, model in found.items():
        assert model["per_token"] == (True, True), name
        assert model["fused_rope"] is False, f"{name} asks for kernels of a Transformer Engine that is not there"
        assert model["vocabulary"] == 0, name
    assert found["llava15_7b_stage2_full_pre"] == {
        "per_token": (True, True),
        "fused_rope": False,
        "vocabulary": 0,
        "visual tokens": 577,  # with the class token, which NeVA drops
        "layers": (16,),  # L/2 of Vicuna-7B, as published
        "head": (4096, 1024, 4096),
    }
    assert found["siglip2_qwen25_7b_stage2_full_pre"]["layers"] == (14,)  # of Qwen2.5-7B
    assert found["siglip2_qwen25_7b_stage2_full_pre"]["visual tokens"] == 576
