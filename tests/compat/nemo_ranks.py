"""What the ranks of tests/compat/test_nemo.py do: NeMo's trainer, strategy and NeVA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_pre.compat import cpu_backend, progress
from tests.compat.tiny_gpt import Layout

TEXT, IMAGE, VOCABULARY = 48, 28, 128
GLOBAL_BATCH, MICRO_BATCH = 8, 2


class Tokenizer:
    """What NeVA asks of a tokenizer."""

    vocab_size, bos_id, eos_id, pad_id = VOCABULARY, 1, 2, 0


def _model(layout: Layout, tower: Path) -> Any:
    import torch
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.collections.llm.gpt.model.base import local_layer_spec
    from nemo.collections.vlm.neva.model.base import NevaConfig, NevaModel
    from nemo.collections.vlm.vision.base import HFCLIPVisionConfig, MultimodalProjectorConfig

    bf16 = layout.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    precision = {"bf16": bf16, "params_dtype": dtype, "pipeline_dtype": dtype}
    language = llm.LlamaConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=64,
        seq_length=64,
        make_vocab_size_divisible_by=32,  # 128 needs no padding on one or two tensor ranks
        transformer_layer_spec=local_layer_spec,
        **cpu_backend.TRANSFORMER_CONFIG,
        **precision,
    )
    projector = MultimodalProjectorConfig(
        projector_type="mlp2x_gelu",
        input_size=32,
        hidden_size=32,
        ffn_hidden_size=32,
        **cpu_backend.TRANSFORMER_CONFIG,
        bf16=bf16,
        params_dtype=dtype,
    )
    config = NevaConfig(
        language_transformer_config=language,
        vision_transformer_config=HFCLIPVisionConfig(hidden_size=32, pretrained_model_name_or_path=str(tower)),
        vision_projection_config=projector,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        **precision,
    )
    optimizer = OptimizerConfig(
        lr=1e-3, use_distributed_optimizer=layout.distributed_optimizer, bf16=bf16, params_dtype=dtype
    )
    return NevaModel(config, tokenizer=Tokenizer(), optim=nl.MegatronOptimizerModule(config=optimizer))


def _data() -> Any:
    import lightning.pytorch as pl
    import torch
    from nemo.lightning.pytorch.plugins import MegatronDataSampler

    class SameSample(torch.utils.data.Dataset):
        """One sample, so that every global batch is the same whatever the ranks and the step."""

        def __len__(self) -> int:
            return 20 * GLOBAL_BATCH

        def __getitem__(self, index: int) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randint(3, VOCABULARY, (TEXT + 1,), generator=generator)
            labels = tokens[1:].clone()
            tokens[0] = -200  # one whole image
            return {
                "tokens": tokens[:-1],
                "labels": labels,
                "loss_mask": torch.ones(TEXT),
                "position_ids": torch.arange(TEXT),
                "media": torch.randn(3, IMAGE, IMAGE, generator=generator),
                "num_media_tiles": torch.tensor(1),
            }

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = torch.utils.data.default_collate(samples)
        return {**batch, "num_media_tiles": batch["num_media_tiles"].tolist(), "attention_mask": None}

    class Data(pl.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.data_sampler = MegatronDataSampler(
                seq_len=64, micro_batch_size=MICRO_BATCH, global_batch_size=GLOBAL_BATCH
            )

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(SameSample(), batch_size=MICRO_BATCH, collate_fn=collate)

    return Data()


def tower(directory: Path) -> None:
    """Write a vision tower of random weights."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE,
        patch_size=7,
    )
    CLIPVisionModel(config).save_pretrained(directory)


def fit(
    layout: Layout,
    tower: Path,
    steps: int,
    save_to: Path | None = None,
    resume_from: Path | None = None,
) -> tuple[list[float], list[str]]:
    """Train to step ``steps``, a background checkpoint every third; the losses and the parameters' dtypes."""
    cpu_backend.apply()
    progress.apply()
    import lightning.pytorch as pl
    from megatron.core.distributed import DistributedDataParallelConfig
    from nemo import lightning as nl

    losses: list[float] = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            losses.append(float(trainer.callback_metrics["reduced_train_loss"]))

    callbacks: list[Any] = [Losses()]
    if save_to is not None:
        callbacks.append(
            nl.ModelCheckpoint(
                dirpath=str(save_to),
                filename="{step}",
                monitor="reduced_train_loss",
                every_n_train_steps=3,
                save_top_k=-1,
                save_last=False,
                save_context_on_train_end=False,
            )
        )
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        sequence_parallel=layout.sequence,
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=layout.distributed_optimizer),
        process_group_backend="gloo",
        ckpt_async_save=save_to is not None,
        ckpt_optim_fully_reshardable=True,
    )
    trainer = nl.Trainer(
        devices=layout.ranks,
        accelerator="cpu",
        strategy=strategy,
        plugins=nl.MegatronMixedPrecision(precision="bf16-mixed" if layout.precision == "bf16" else "32"),
        max_steps=steps,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=save_to is not None,  # the progress bar stays on: rank 0 prints
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    if save_to is not None:
        nl.NeMoLogger(log_dir=str(save_to), name="log", use_datetime_version=False).setup(trainer)
    model = _model(layout, tower)
    trainer.fit(model, _data(), ckpt_path=str(resume_from) if resume_from else None)
    return losses, sorted({str(p.dtype) for p in model.parameters()})
