"""Weights in and out: every tensor comes back bit for bit, in as little memory as promised, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_pre.config.schema import LanguageConfig, ModelConfig, VisionConfig
from nemo_pre.huggingface.distributed_checkpoint import CheckpointReader
from nemo_pre.huggingface.exporter import export_checkpoint, exported_groups
from nemo_pre.huggingface.importer import import_checkpoint
from nemo_pre.huggingface.safetensors_files import TensorSource, made_files, plan_files
from nemo_pre.huggingface.weights import hub_name, model_weights
from tests.huggingface.megatron_ranks import save_again
from tests.huggingface.tiny import tiny_llava, write_image_processor
from tests.ranks import RankError, run_on_standing_ranks, run_ranks

FAMILIES = {
    "llama_clip": {"language": "llama", "vision": "clip"},
    "qwen2_siglip": {"language": "qwen2", "vision": "siglip"},
    "qwen2_clip_tied": {"language": "qwen2", "vision": "clip", "tie": True},
    "llama_dinov2": {"language": "llama", "vision": "dinov2"},
    "qwen2_aimv2": {"language": "qwen2", "vision": "aimv2"},
    "one_group": {"language": "llama", "vision": "siglip", "num_key_value_heads": 1},
    "no_groups": {"language": "qwen2", "vision": "clip", "num_key_value_heads": 4},
}


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    source = TensorSource(directory)
    return {hub_name(name): source.read(name) for name in source.names()}


def same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_comes_back_bit_for_bit(family, dtype, tmp_path):
    original = tiny_llava(tmp_path / "hf", **FAMILIES[family])
    save_file(
        {name: tensor.to(dtype) for name, tensor in load_file(original / "model.safetensors").items()},
        original / "model.safetensors",
    )
    import_checkpoint(str(original), str(tmp_path / "checkpoint"))
    export_checkpoint(str(tmp_path / "checkpoint"), str(tmp_path / "back"), max_file_gb=5e-5)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2, "in several files, with an index"
    same_bits(tensors_of(tmp_path / "back"), tensors_of(original))
    kept = ("chat_template.jinja", "tokenizer.json", "preprocessor_config.json", "generation_config.json")
    for name in kept:
        assert (tmp_path / "back" / name).read_bytes() == (original / name).read_bytes()


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen2_siglip", {}),
        ("qwen2_aimv2", {}),
        ("qwen2_siglip", {"tensor": 2}),
        ("no_groups", {"tensor": 2}),
        ("llama_clip", {"pipeline": 2}),
        ("qwen2_clip_tied", {"pipeline": 2}),
        ("llama_dinov2", {"pipeline": 2}),
    ],
    ids=str,
)
def test_what_megatron_holds_in_a_layout_comes_back_bit_for_bit(family, layout, tmp_path):
    """Imported, loaded on the ranks of the layout, saved by them, exported; and a rank holds what it should."""
    original = tiny_llava(tmp_path / "hf", **FAMILIES[family])
    import_checkpoint(str(original), str(tmp_path / "checkpoint"))
    ranks = math.prod(layout.values())
    held = run_on_standing_ranks(save_again, ranks, str(tmp_path / "checkpoint"), layout, str(tmp_path / "saved"))
    export_checkpoint(str(tmp_path / "saved"), str(tmp_path / "back"))
    same_bits(tensors_of(tmp_path / "back"), tensors_of(original))
    if "tensor" in layout:
        hf = tensors_of(original)
        gate, up = (hf[f"language_model.model.layers.1.mlp.{part}_proj.weight"].chunk(2) for part in ("gate", "up"))
        for rank, parameters in enumerate(held):
            found = parameters["language_model.decoder.layers.1.mlp.linear_fc1.weight"]
            assert torch.equal(found, torch.cat([gate[rank], up[rank]]))


def test_a_fresh_model_is_assembled_from_a_tower_and_a_language_model(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, CLIPConfig, CLIPModel

    both = tiny_llava(tmp_path / "hf", language="qwen2", vision="clip")
    config = AutoConfig.from_pretrained(both)
    AutoModelForCausalLM.from_config(config.text_config).save_pretrained(tmp_path / "lm")
    CLIPModel(CLIPConfig(vision_config=config.vision_config.to_dict())).save_pretrained(tmp_path / "clip")
    write_image_processor(tmp_path / "clip", "clip", 16)
    for path in both.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "lm")
    import_checkpoint(vision=str(tmp_path / "clip"), language=str(tmp_path / "lm"), out=str(tmp_path / "fresh"))
    export_checkpoint(str(tmp_path / "fresh"), str(tmp_path / "back"))
    found = tensors_of(tmp_path / "back")
    parts = {
        "language_model.": TensorSource(tmp_path / "lm"),
        "vision_tower.": TensorSource(tmp_path / "clip"),
    }
    projector = {name for name in found if name.startswith("multi_modal_projector.")}
    assert len(projector) == 4 and all(found[name].std() > 0 for name in projector if name.endswith("weight"))
    for name in found.keys() - projector:
        prefix = next(prefix for prefix in parts if name.startswith(prefix))
        assert torch.equal(found[name], parts[prefix].read(name.removeprefix(prefix))), name


# --- memory ---------------------------------------------------------------------------------------------------------

QWEN2_72B = LanguageConfig(
    family="qwen2",
    num_layers=80,
    hidden_size=8192,
    ffn_hidden_size=29568,
    num_attention_heads=64,
    num_query_groups=8,
    vocab_size=152064,
)


class MetaReader:
    """A checkpoint whose tensors have shapes and no values; it adds up what is alive."""

    directory = Path("meta")

    def __init__(self, model: ModelConfig) -> None:
        self._tensors = {
            weight.key: (weight.shape if weight.layer is None else (80, *weight.shape), torch.bfloat16)
            for weight in model_weights(model)
        }

    def tensors(self):
        return self._tensors

    def read(self, key, layer=None):
        shape, dtype = self._tensors[key]
        return torch.empty(shape if layer is None else shape[1:], dtype=dtype, device="meta")


def test_a_72b_model_is_exported_in_less_than_ten_gigabytes_of_memory():
    """By counting: a file's tensors, and the tensor at hand twice (as read, and as cut)."""
    vision = VisionConfig(
        family="siglip", hidden_size=1152, intermediate_size=4304, num_layers=2, num_attention_heads=16,
        image_size=384, patch_size=16,
    )  # fmt: skip
    model = ModelConfig(name="72B", vision=vision, language=QWEN2_72B)
    reader = MetaReader(model)
    weights = model_weights(model)
    groups = list(exported_groups(weights, model, reader, image_token_id=151665, dtype="auto"))
    files = plan_files(groups, max_bytes=4_000_000_000)
    held = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in made_files(files)]
    largest = max(math.prod(weight.shape) * 2 for weight in weights)
    assert 144e9 < sum(held) < 147e9, "the whole model in bf16"
    assert max(held) <= 4e9
    assert max(held) + 2 * largest < 10e9
    assert [sum(sum(group.sizes.values()) for group in file) for file in files] == held


def test_an_import_reads_one_tensor_at_a_time(tmp_path, monkeypatch):
    original = tiny_llava(tmp_path / "hf")
    read = []
    monkeypatch.setattr(
        TensorSource, "read", lambda self, name, _read=TensorSource.read: read.append(name) or _read(self, name)
    )
    written = []
    monkeypatch.setattr(
        "nemo_pre.huggingface.progress.bytes_progress", lambda what, total: lambda size: written.append(len(read))
    )
    monkeypatch.setattr(
        "nemo_pre.huggingface.importer.bytes_progress", lambda what, total: lambda size: written.append(len(read))
    )
    import_checkpoint(str(original), str(tmp_path / "checkpoint"))
    at_a_time = [after - before for before, after in zip([0, *written[:-1]], written, strict=True)]
    assert max(at_a_time) <= 3, "query, key and value"


# --- what goes wrong ------------------------------------------------------------------------------------------------


def damaged(directory: Path, **config: object) -> Path:
    path = directory / "config.json"
    values = json.loads(path.read_text())
    for key, value in config.items():
        part, _, name = key.partition("__")
        (values[part] if name else values)[name or key] = value
    path.write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"model_type": "llava_next"},
            "model_type=llava_next: only llava, spatial_llava, qwen2_5_vl, spatial_qwen_vl",
        ),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act=relu: only projector_hidden_act=gelu"),
        ({"vision_feature_layer": [-2, -3]}, "only one layer"),
        ({"text_config__hidden_act": "gelu"}, "hidden_act=gelu: only hidden_act=silu"),
        ({"text_config__attention_bias": True}, "attention_bias=True"),
        ({"text_config__head_dim": 16}, "head_dim=16"),
        ({"text_config__rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling of type yarn"),
        ({"vision_config__hidden_act": "gelu"}, "hidden_act=gelu: only hidden_act=quick_gelu"),
        (
            {"text_config__intermediate_size": 64},
            r"gate_proj.weight in .* has shape \[56, 32\] .* makes it \[64, 32\]",
        ),
        ({"text_config__num_hidden_layers": 5}, "has no tensor language_model.model.layers.4"),
        ({"text_config__num_hidden_layers": 3}, "layers.3.* has no place in the model"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(config, sentence, tmp_path):
    original = damaged(tiny_llava(tmp_path / "hf"), **config)
    with pytest.raises(ValueError, match=sentence):
        import_checkpoint(str(original), str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"], "nothing is left of it"


def test_a_pickle_is_refused_unless_allowed_and_then_cannot_run_code(tmp_path):
    original = tiny_llava(tmp_path / "hf")
    tensors = load_file(original / "model.safetensors")
    (original / "model.safetensors").unlink()
    torch.save(tensors, original / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is a pickle, which may run code"):
        import_checkpoint(str(original), str(tmp_path / "no"))
    import_checkpoint(str(original), str(tmp_path / "yes"), allow_pickle=True)
    export_checkpoint(str(tmp_path / "yes"), str(tmp_path / "back"))
    same_bits(tensors_of(tmp_path / "back"), tensors)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({**tensors, "evil": Evil()}, original / "pytorch_model.bin")
    with pytest.raises(ValueError, match="more than tensors, which weights_only refuses"):
        import_checkpoint(str(original), str(tmp_path / "evil"), allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_buffers_of_older_files_are_passed_over_and_whole_numbers_are_no_weights(tmp_path):
    original = tiny_llava(tmp_path / "hf")
    tensors = load_file(original / "model.safetensors")
    buffers = {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file({**tensors, **buffers}, original / "model.safetensors")
    import_checkpoint(str(original), str(tmp_path / "checkpoint"))
    export_checkpoint(str(tmp_path / "checkpoint"), str(tmp_path / "back"))
    same_bits(tensors_of(tmp_path / "back"), tensors)
    name = "multi_modal_projector.linear_1.bias"
    for changed, sentence in (
        ({name: torch.arange(32)}, f"{name} in .* holds I64"),
        ({"vision_tower.counts": torch.ones(3)}, "has vision_tower.vision_model.counts, which has no place"),
    ):
        save_file({**tensors, **changed}, original / "model.safetensors")
        with pytest.raises(ValueError, match=sentence):
            import_checkpoint(str(original), str(tmp_path / "other"))


def test_a_file_cut_short_is_named(tmp_path):
    original = tiny_llava(tmp_path / "hf")
    path = original / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model.safetensors is missing or broken"):
        import_checkpoint(str(original), str(tmp_path / "out"))


def test_a_checkpoint_of_which_a_file_is_cut_is_named(tmp_path):
    import_checkpoint(str(tiny_llava(tmp_path / "hf")), str(tmp_path / "checkpoint"))
    data = next((tmp_path / "checkpoint" / "weights").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"checkpoint is damaged, __0_0.distcp ends before "):
        export_checkpoint(str(tmp_path / "checkpoint"), str(tmp_path / "back"))
    assert not (tmp_path / "back").exists()
    (tmp_path / "checkpoint" / "weights" / ".metadata").unlink()
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        CheckpointReader(tmp_path / "checkpoint")


def test_nothing_is_overwritten(tmp_path):
    original = tiny_llava(tmp_path / "hf")
    import_checkpoint(str(original), str(tmp_path / "checkpoint"))
    with pytest.raises(ValueError, match="exists already"):
        import_checkpoint(str(original), str(tmp_path / "checkpoint"))


def export_until_the_third_file(checkpoint: str, out: str) -> None:
    """In a process of its own, which is killed before the third file is written."""
    from nemo_pre.huggingface import safetensors_files

    made = safetensors_files.made_files

    def kill_at_the_third(files):
        for number, tensors in enumerate(made(files)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield tensors

    safetensors_files.made_files = kill_at_the_third
    export_checkpoint(checkpoint, out, max_file_gb=5e-5)


def test_a_killed_export_leaves_nothing_that_loads_and_the_next_one_succeeds(tmp_path):
    import_checkpoint(str(tiny_llava(tmp_path / "hf")), str(tmp_path / "checkpoint"))
    with pytest.raises(RankError, match="exited with code -9 and without a result"):
        run_ranks(export_until_the_third_file, 1, str(tmp_path / "checkpoint"), str(tmp_path / "back"))
    assert not (tmp_path / "back").exists()
    assert not (tmp_path / "back.partial" / "config.json").exists(), "transformers loads no directory without one"
    export_checkpoint(str(tmp_path / "checkpoint"), str(tmp_path / "back"))
    same_bits(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "hf"))
    assert not (tmp_path / "back.partial").exists()


def test_nemos_connectors_are_the_same_way_in_and_out(tmp_path):
    original = tiny_llava(tmp_path / "hf")
    (tensors,) = run_ranks(through_connectors, 1, str(tmp_path))
    same_bits(tensors, tensors_of(original))


def through_connectors(root: str) -> dict[str, torch.Tensor]:
    from nemo.lightning import io

    from nemo_pre.nemo import connectors  # noqa: F401
    from nemo_pre.nemo.module import VisualNevaModel

    model = VisualNevaModel.importer(f"hf://{root}/hf").init()
    assert model.config.language_transformer_config.num_layers == 4
    checkpoint = io.import_ckpt(model, f"hf://{root}/hf", output_path=Path(root) / "checkpoint")
    out = VisualNevaModel.exporter("hf", checkpoint)(Path(root) / "back")
    return tensors_of(out)
