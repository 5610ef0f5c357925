"""Write tests/huggingface/transformers5: tiny random models as transformers 5 saves them, and what it says of them.

The tests compare our model with these numbers, since the transformers that we run on cannot tell whether the newer
spelling was understood. In an environment of its own:

    pip install transformers==5.24.0 torch==2.9.1
    python tests/huggingface/make_transformers5_fixtures.py

Each directory holds a model's ``config.json`` and weights in bfloat16, and ``said.safetensors``: for each question its
token ids (images expanded), pixels, and the float32 logits of its last positions, computed from the rounded weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

TRANSFORMERS = "5.24.0"
ROOT = Path(__file__).parent / "transformers5"
KEPT = 6  # positions at the end of each question
VOCABULARY, IMAGE, VIDEO, START, END = 300, 290, 291, 292, 293
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
    "intermediate_size": 40,
}  # fmt: skip
QWEN_TOWER = {
    "depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "window_size": 16,
    "fullatt_block_indexes": [1], "out_hidden_size": 32, "in_channels": 3,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
QWEN2 = {"rope_type": "default", "rope_theta": 1e6}


def rounded(model: Any) -> Any:
    """The model with weights that bfloat16 can hold, each of them random: a swapped pair of norms must show."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1 if parameter.ndim == 1 else 0.2)
        parameter.data = (
            parameter.data.bfloat16().float()
        )  # not the model: its rotary frequencies would be rounded too
    return model.eval()


def write(name: str, model: Any, questions: list[dict[str, Tensor]]) -> None:
    """Save the model in bfloat16 with its answers to the questions, which are its own arguments."""
    directory = ROOT / name
    model = rounded(model)
    said: dict[str, Tensor] = {}
    for number, question in enumerate(questions):
        with torch.no_grad():
            output = model(**question)
        kept = output.logits[0, -KEPT:] if hasattr(output, "logits") else output.hidden_states[-2][0]
        said |= {f"{number}.{key}": value for key, value in question.items() if isinstance(value, Tensor)}
        said[f"{number}.said"] = kept.float().contiguous()
    model.to(torch.bfloat16).save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    save_file(said, directory / "said.safetensors")


def words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(4, 250, (count,), generator=generator).tolist()


def of_ids(ids: list[int], **more: Tensor) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64), **more}


def llava_questions() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    pictures = torch.randn(3, 3, 16, 16, generator=generator)
    return [
        of_ids(words(40, generator)),
        of_ids([*words(5, generator), *[IMAGE] * 16, *words(8, generator)], pixel_values=pictures[:1].clone()),
        of_ids([7, *[IMAGE] * 32, *words(7, generator)], pixel_values=pictures[1:].clone()),
    ]


def qwen_vl_questions() -> list[dict[str, Tensor]]:
    """Two pictures of 2 x 5 and 3 x 1 visual tokens; a patch of the second frame is that of the first."""
    generator = torch.Generator().manual_seed(5)
    frames = torch.randn(52, 3, 1, 16, generator=generator).expand(-1, -1, 2, -1).flatten(1)
    grids = torch.tensor([[1, 4, 10], [1, 6, 2]])
    ids = [9, START, *[IMAGE] * 10, END, 10, START, *[IMAGE] * 3, END, *words(8, generator)]
    kinds = torch.tensor([[int(token == IMAGE) for token in ids]])  # transformers 5.24 finds images by these
    return [
        of_ids(words(40, generator)),
        of_ids(ids, pixel_values=frames.contiguous(), image_grid_thw=grids, mm_token_type_ids=kinds),
    ]


def llava(vision: Any, text: Any, **how: Any) -> Any:
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=16, **how
    )
    return transformers.LlavaForConditionalGeneration(config)


def main() -> None:
    if transformers.__version__ != TRANSFORMERS:
        raise SystemExit(f"transformers {transformers.__version__} is installed: this needs {TRANSFORMERS}.")
    shutil.rmtree(ROOT, ignore_errors=True)
    clip, siglip = transformers.CLIPVisionConfig(**TOWER), transformers.SiglipVisionConfig(**TOWER)
    llama = transformers.LlamaConfig(**TEXT, rope_parameters=dict(LLAMA3))
    qwen2 = transformers.Qwen2Config(**TEXT, rope_parameters=dict(QWEN2), tie_word_embeddings=True)
    write("llava_clip_llama3", llava(clip, llama), llava_questions())
    tied = {"vision_feature_select_strategy": "full", "tie_word_embeddings": True}
    write("llava_siglip_qwen2_tied", llava(siglip, qwen2, **tied), llava_questions())
    picture: dict[str, Any] = {"pixel_values": torch.randn(1, 3, 16, 16), "output_hidden_states": True}
    write("clip", transformers.CLIPVisionModel(clip), [picture])
    write("siglip", transformers.SiglipVisionModel(siglip), [picture])
    alone = transformers.Qwen2Config(**TEXT, rope_parameters=dict(QWEN2))
    write("qwen2", transformers.Qwen2ForCausalLM(alone), llava_questions()[:1])
    text = {**TEXT, "rope_parameters": {**QWEN2, "mrope_section": [2, 1, 1]}}
    whole = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=QWEN_TOWER, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    write("qwen2_5_vl", transformers.Qwen2_5_VLForConditionalGeneration(whole), qwen_vl_questions())


if __name__ == "__main__":
    main()
