"""What lies beside an exported Llama 3: it ends its turns as its chat template does."""

from __future__ import annotations

import json

from nemo_pre.config.compose import compose_run
from nemo_pre.data.conversation import IMAGE_TAG
from nemo_pre.huggingface.processor import write_processor
from tests.data.tokenizers import llama3_like


def test_an_exported_llama3_stops_where_a_turn_ends_and_where_a_text_ends(tmp_path):
    from transformers import AutoProcessor

    llama3_like().save_pretrained(tmp_path / "tokenizer")
    parts = ["model=llava15_7b", "model/language=llama3_8b", f"model.tokenizer={tmp_path / 'tokenizer'}"]
    run = compose_run([*parts, "stage=stage2_full"])
    (tmp_path / "hf").mkdir()
    image = write_processor(run, run.model, tmp_path / "checkpoint", tmp_path / "hf").image
    tokenizer = llama3_like()
    ends = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])
    values = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert values["eos_token_id"] == sorted(ends)
    assert values["suppress_tokens"] == [image] == [tokenizer.convert_tokens_to_ids(IMAGE_TAG)]

    processor = AutoProcessor.from_pretrained(tmp_path / "hf", use_fast=False)
    content = [{"type": "image"}, {"type": "text", "text": "What is it? "}]
    asked = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert asked == (
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ), "the tokenizer puts bos before it"
