"""The adapter with which lmms-eval runs an exported directory. Imported in lmms-eval's process only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.utils import Collator
from PIL import Image
from tqdm import tqdm

from nemo_pre.evaluation.prompts import chat_message

MAX_NEW_TOKENS = 1024  # where a task states none; lmms-eval's own LLaVA does the same
PASSED_ON = (
    "temperature",
    "top_p",
    "top_k",
    "num_beams",
    "repetition_penalty",
)  # to generate(), where a task has them


class ExportedVLM(lmms):
    """A LLaVA, a Qwen2.5-VL or our own kind of one from a local directory, with its own processor and chat template.

    Code from the directory runs only where it is what an export writes. Prompts of a batch are padded on the left.
    Under torchrun each process takes its share of the questions and the GPU of its local rank.
    """

    is_simple = True  # the kind of lmms-eval's models that answers generate_until and loglikelihood

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, device: str | None = None, dtype: str = "auto", **_: Any
    ) -> None:
        super().__init__()
        from transformers import AutoModelForImageTextToText

        from nemo_pre.huggingface.loading import load_processor, needs_own_code

        directory = Path(pretrained)
        if not (directory / "config.json").is_file():
            raise ValueError(f"{directory} has no config.json: give the directory of an exported model.")
        own_code = needs_own_code(directory)
        self._device = torch.device(device or _default_device())
        model = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype, trust_remote_code=own_code)
        self.model = model.to(self._device).eval()
        self.processor = load_processor(directory, trust_remote_code=own_code)
        self.processor.tokenizer.padding_side = "left"
        self.batch_size = int(batch_size)
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    @property
    def device(self) -> torch.device:
        return self._device

    @torch.inference_mode()
    def generate_until(self, requests: list[Any]) -> list[str]:
        """Greedy unless the task says otherwise, up to ``max_new_tokens`` or the first of the task's ``until``."""
        arguments = [request.args for request in requests]
        # Longest first: what does not fit into memory shows at once. Only equal settings share a batch.
        order = Collator(arguments, lambda each: (-len(each[0]), each[0]), grouping=True)
        answers: list[str] = []
        with tqdm(total=len(arguments), disable=self.rank != 0, desc="answers") as progress:
            for batch in order.get_batched(n=self.batch_size):
                answers += self._answer(batch, dict(batch[0][1]))
                progress.update(len(batch))
        return list(order.get_original(answers))

    def _answer(self, batch: list[Any], settings: dict[str, Any]) -> list[str]:
        prompts, images = [], []
        for context, _, doc_to_visual, doc_id, task, split in batch:
            own_images = self._images(doc_to_visual, task, split, doc_id)
            prompts.append(self._render(chat_message(context, len(own_images))))
            images += own_images
        inputs = self._inputs(prompts, images)
        sampling = {name: settings[name] for name in PASSED_ON if settings.get(name) is not None}
        if not sampling.get("temperature"):
            sampling = {"num_beams": sampling.get("num_beams", 1), "do_sample": False}
        else:
            sampling["do_sample"] = True
        generated = self.model.generate(
            **inputs,
            **sampling,
            max_new_tokens=int(settings.get("max_new_tokens") or MAX_NEW_TOKENS),
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        texts = self.processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [_until(text, settings.get("until")) for text in texts]

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """The mean cross-entropy (nats) of each request's answer tokens, of which lmms-eval takes the smallest, and
        whether greedy decoding would give that answer."""
        results = []
        for request in tqdm(requests, disable=self.rank != 0, desc="likelihoods"):
            context, target, doc_to_visual, doc_id, task, split = request.args
            answer = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
            images = self._images(doc_to_visual, task, split, doc_id)
            question = chat_message(context, len(images))
            prompt = self._inputs([self._render(question)], images)["input_ids"]
            # The lead of an answer belongs to the template, and so does the blank that some tasks put before it.
            reply = {"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]}
            inputs = self._inputs([self._render(question, reply)], images)
            start = _common_prefix(prompt[0], inputs["input_ids"][0])
            logits = self.model(**inputs).logits[:, start - 1 : -1].float()
            wanted = inputs["input_ids"][:, start:]
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted)
            # Wrapped, because lmms-eval 0.7 turns a bare pair into text and then fails to take it apart.
            results.append(GenerationResult((float(loss), bool((logits.argmax(-1) == wanted).all()))))
        return results

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("Tasks of several rounds are not supported: choose another task.")

    def _images(self, doc_to_visual: Any, task: str, split: str, doc_id: int) -> list[Image.Image]:
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if callable(doc_to_visual) else None
        visuals = visuals or []
        if not all(isinstance(visual, Image.Image) for visual in visuals):
            raise ValueError(f"Task {task} shows something other than images: choose a task of images and text.")
        return [visual.convert("RGB") for visual in visuals]

    def _render(self, *messages: dict[str, Any]) -> str:
        return str(
            self.processor.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=messages[-1]["role"] == "user"
            )
        )

    def _inputs(self, prompts: list[str], images: list[Image.Image]) -> Any:
        bos = self.processor.tokenizer.bos_token
        inputs = self.processor(
            text=prompts,
            images=images or None,
            padding=True,
            return_tensors="pt",
            # Some templates write the bos token themselves.
            add_special_tokens=not (bos and prompts[0].startswith(bos)),
        )
        return inputs.to(self._device, self.model.dtype)


def _default_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def _until(text: str, stops: str | list[str] | None) -> str:
    """The text before the first of ``stops``."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        if stop:
            text = text.split(stop)[0]
    return text.strip()


def _common_prefix(prompt: torch.Tensor, whole: torch.Tensor) -> int:
    """Tokens of ``prompt`` that ``whole`` begins with: a tokenizer may merge the last one with the answer."""
    length = min(len(prompt), len(whole) - 1)
    differs = (prompt[:length] != whole[:length]).nonzero()
    return int(differs[0]) if len(differs) else length
