"""The typed shape of a run's configuration: every field a user may set, with its unit and default.

The YAML groups in ``recipes/`` are merged into these dataclasses by Hydra, so an unknown key or a value of
the wrong type is refused while composing. What one field alone cannot decide (does the layout divide the
model, is the data there) is decided in :mod:`nemo_pre.checks.run`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class VisionConfig:
    """The vision tower: a ``transformers`` vision model, or an MLP on patches, and the resolution it is fed. Its
    weights are random, or come with ``init_from``."""

    # clip | siglip | dinov2 | aimv2 | aimv2_native | qwen25_vl | patch_mlp (no layers, trained from scratch)
    family: str = "clip"
    image_size: int = MISSING  # pixels, square; with native resolution 0: an image keeps its aspect ratio
    patch_size: int = MISSING  # pixels, square
    hidden_size: int = MISSING
    intermediate_size: int = (
        MISSING  # of dinov2 a multiple of hidden_size; of patch_mlp the width between its two layers
    )
    num_layers: int = MISSING  # of patch_mlp 0
    num_attention_heads: int = MISSING  # of patch_mlp 1
    feature_layer: int = -2  # index into hidden_states: -2 is the output of the last layer but one
    drop_class_token: bool = True
    min_visual_tokens: int | None = None  # of an image, native resolution only; smaller are enlarged
    max_visual_tokens: int | None = None  # likewise; larger are reduced; at least four times the former
    window_size: int | None = None  # of qwen25_vl: pixels, square, within which most layers attend
    full_attention_layers: list[int] | None = None  # of qwen25_vl: from 0, those that attend to the whole image
    image_mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    image_std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])


@dataclass
class RopeScalingConfig:
    """How the frequencies of the rotary embedding are slowed down for longer sequences."""

    kind: str = "none"  # none | linear (all, by factor) | llama3 (Llama 3.1: the slow ones, by factor)
    factor: float = 1.0
    low_freq_factor: float = 1.0  # of llama3, with the next two
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclass
class LanguageConfig:
    """The language model: a Llama- or Qwen2-shaped decoder. Its weights are random, or come with ``init_from``."""

    family: str = "llama"  # llama | qwen2 (qwen2: bias on the query, key and value projections)
    num_layers: int = MISSING
    hidden_size: int = MISSING
    ffn_hidden_size: int = MISSING
    num_attention_heads: int = MISSING
    num_query_groups: int = MISSING
    vocab_size: int = MISSING  # tokenizer's size; padded to a multiple of 128 x TP inside the model
    rotary_base: float = 10000.0
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    max_position_embeddings: int | None = None  # what an exported model states; null: data.sequence_length
    layernorm_epsilon: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02


@dataclass
class ModelConfig:
    name: str = MISSING
    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    projector: str = "mlp2x_gelu"
    attention: str = "causal"  # causal | mixed (visual tokens of one image see each other both ways)
    attention_backend: str = "auto"  # of mixed attention: auto | dense | split | flex (GPU only; what auto takes)
    rope: str = "1d"  # 1d | 2d (row and column of a patch) | mrope (Qwen2-VL's: time, row, column)
    rope_sections: list[int] | None = None  # frequencies per axis; null: 2d alternates, mrope 2:3:3
    tokenizer: str | None = None  # HF tokenizer directory; null: the one that lies with the data


@dataclass
class BlendSource:
    """One prepared set of several that are trained on together."""

    path: str = MISSING  # directory that `nemo-pre data ...` wrote
    weight: float = 1.0  # in proportion to which its samples are drawn


@dataclass
class DataConfig:
    name: str = MISSING
    path: str = MISSING  # directory that `nemo-pre data ...` wrote; with blend, of validation and tokenizer only
    blend: list[BlendSource] | None = None  # train on these instead of path's training split
    sequence_length: int = MISSING  # tokens of text and images together; longer samples are cut
    num_workers: int = 0  # loader processes per rank
    shuffle_seed: int = 0
    chat_template: str = "plain"  # plain | vicuna_v1 | caption | chatml | qwen_vl | llama3
    image_resize: str = "whole"  # whole (aspect ratio lost) | crop (CLIP's centre crop) | pad (LLaVA-1.5's "pad")
    image_filter: str = "bicubic"  # bicubic (CLIP, SigLIP) | bilinear (SigLIP2)
    max_tiles: int = 1  # of an image: its thumbnail and the cells of a grid, as LLaVA-NeXT's; 1, or 3 and more
    features: str | None = None  # directory of `nemo-pre data features`: a frozen encoder's output instead of images
    on_error: str = "raise"  # raise | skip: what a sample that cannot be read does
    packing: bool = False  # several samples, isolated, in a sequence; batch sizes count sequences
    packing_window: int = 1024  # samples that are packed at a time
    record_samples: bool = False  # samples.jsonl: the names of the samples that each step trained on
    on_state_mismatch: str = "raise"  # raise | restart (the data, not the run): a resume whose data state is another's


@dataclass
class ParallelConfig:
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None  # model chunks per pipeline rank
    pipeline_layers: list[int] | None = None  # decoder layers of each chunk, as a sample meets them; null: even
    context: int = 1
    sequence: bool = False  # sequence parallelism inside the tensor-parallel group
    data: int = 1
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool | None = None  # during the backward pass; null: where there are replicas
    recompute: str = "none"  # none | selective | full
    recompute_num_layers: int = 1


@dataclass
class PrecisionConfig:
    """What parameters and activations are; gradients, master weights and moments are float32. With fp8_* the decoder's
    layers multiply matrices in FP8 (Transformer Engine, on Hopper and later)."""

    name: str = MISSING  # fp32 | bf16 | fp8_delayed | fp8_tensorwise | fp8_blockwise
    amax_history: int = 1024  # micro-batches whose largest values fp8_delayed scales by
    bf16_layers: int | None = None  # at each end of the decoder without FP8; null: 1, none with fp8_delayed


@dataclass
class OptimConfig:
    """AdamW with a cosine schedule; a module's own learning rate overrides ``lr``, and 0 means 0."""

    lr: float = MISSING
    lr_vision: float | None = None
    lr_projector: float | None = None
    lr_language: float | None = None
    lr_heads: float | None = None
    min_lr_ratio: float = 0.0  # of each module's own peak
    warmup_ratio: float = 0.03  # of max_steps
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0
    freeze_vision: bool = False
    freeze_projector: bool = False
    freeze_language: bool = False


@dataclass
class ScheduleConfig:
    """A weight over training: ``constant``, or from ``start`` to the full weight by ``linear``/``cosine``."""

    kind: str = "constant"  # constant | linear | cosine
    start: float = 0.0  # fraction of the weight at step 0
    steps: int = 0  # optimizer steps the ramp lasts


@dataclass
class PReConfig:
    """Predictive Regularization (arXiv 2603.20808)."""

    enabled: bool = False
    weight: float = 0.5  # lambda
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    layers: list[int] | None = None  # 1-based decoder layers; null: L/2; -1: the last
    variant: str = "patch"  # patch | global (mean-pooled per image)
    anchor: str = "pre_llm"  # pre_llm | pre_projector | external
    external_path: str | None = None  # HF vision model for anchor=external
    external_image_size: int | None = None  # pixels; null: the external model's own
    external_features: str | None = None  # directory of `nemo-pre data features of=objective.pre`: the model's output
    ema_momentum: float | None = None  # moving anchor: EMA of the projector; null: the live projector
    head_hidden_ratio: float = 0.25  # hidden width of the MLP as a fraction of the decoder's width
    head_activation: str = "gelu"  # gelu | relu | silu
    head_norm: bool = False  # LayerNorm before the MLP


@dataclass
class LaVerConfig:
    """Latent Visual Reconstruction (arXiv 2512.06281); the defaults are the preset ``objective=laver/paper``."""

    enabled: bool = False
    sequence: str = "images"  # what is masked: images (packed, each by itself) | whole (each sample again, with text)
    mim_weight: float = 1.0
    mim_schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    gram_weight: float = 1.0
    gram_schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    mask_ratio: float = 0.05  # at the end of the schedule
    mask_schedule: str = "cosine"  # cosine (from 0) | delayed (0 for an eighth of the run) | constant
    mask_sampling: str = "bernoulli"  # bernoulli | count (floor(ratio x tokens) of each image)
    mask_token: str = "learned"  # what the student sees in a masked place: learned (a vector) | embedding (a word's)
    mask_token_id: int | None = None  # the word of mask_token=embedding
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    centring: bool = False  # subtract a running mean from the teacher's logits
    center_momentum: float = 0.9
    mim_reduction: str = "global"  # mean over masked tokens: global | micro_batch (mean of micro-batches' means)
    gram_clipped: bool = True
    gram_scope: str = "image"  # image | micro_batch (all visual tokens of a micro-batch together)
    gram_positions: str = "all"  # all | masked
    head_hidden_width: int = 2048
    momentum: float = 0.999  # of the teacher's average; where a schedule starts
    momentum_schedule: str = "constant"  # constant | cosine (to 1)
    update_every: int = 1  # optimizer steps between two updates of the teacher
    update_fraction: float | None = None  # the same as a fraction of max_steps; goes before update_every
    teacher_memory: str = "resident"  # resident (a copy in the weights' dtype) | gathered (layer by layer)


@dataclass
class ObjectiveConfig:
    """L = lm_weight L_LM + pre.weight L_PRe + laver.mim_weight L_MIM + laver.gram_weight L_CGA."""

    name: str = "none"
    lm_weight: float = 1.0
    pre: PReConfig = field(default_factory=PReConfig)
    laver: LaVerConfig = field(default_factory=LaVerConfig)


@dataclass
class TrainerConfig:
    max_steps: int = MISSING  # optimizer steps
    global_batch_size: int = MISSING  # samples
    micro_batch_size: int = MISSING  # samples
    log_every: int = 1  # steps
    log_grad_norms_every: int | None = None  # steps; gradient norm of each loss term, at a backward pass per term
    log_similarity_every: int | None = None  # steps; mean cosine between an image's visual tokens, layer by layer
    log_diagnostics_every: int | None = None  # steps; probes, contrast and more of a few pictures, layer by layer
    wandb_project: str | None = None  # of Weights & Biases, which gets the metrics too; WANDB_* variables as it says
    val_every: int | None = None  # steps; null: at the end only
    val_samples: int = 256  # scenes whose answers are generated for exact match
    checkpoint_every: int | None = None  # steps; null: at the end only
    keep_checkpoints: int = 2
    async_checkpoint: bool = False
    ignore_memory_estimate: bool = False  # train although nemo-pre plan's count says that a rank's memory is too small
    rank_timeout: int = 3600  # seconds a collective may wait before the job is ended; more than hang_timeout
    hang_timeout: int = 1800  # seconds without a finished step after which every rank prints its stacks and ends
    nan_action: str = "stop"  # stop | roll_back: at a loss or gradient that is not finite
    spike_action: str = "none"  # none | stop | roll_back (to the last checkpoint, leaving out the batches since)
    spike_factor: float = 3.0  # a loss is a spike above so many times the median of the last spike_window steps
    spike_window: int = 100  # steps; a fifth of them must be there
    max_roll_backs: int = 10  # of a run; the next one stops it


@dataclass
class ClusterConfig:
    """Where a run's ranks are, and for `nemo-pre submit` what a Slurm site wants to know: one file per site in
    recipes/cluster. How many tasks and GPUs a node gets follows from the layout and ``nodes``."""

    name: str = "local"
    nodes: int = 1
    devices_per_node: int | None = None  # null: as many as the layout needs
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_limit: str | None = None  # days-hours:minutes:seconds; null: the partition's
    warning_seconds: int = 120  # before the time limit a checkpoint is written and the job requeued
    cpus_per_task: int | None = None
    memory_per_node: str | None = None  # as sbatch --mem takes it
    exclude: list[str] = field(default_factory=list)  # nodes
    sbatch_options: list[str] = field(default_factory=list)  # further ones, such as --exclusive
    container_image: str | None = None  # for pyxis and enroot; null: no container
    container_mounts: list[str] = field(default_factory=list)  # FROM:TO; the working directory is always mounted
    python: str | None = None  # of the virtual environment; null: the submitting one, in a container python3
    environment: dict[str, str] = field(default_factory=dict)  # NCCL_*, GLOO_SOCKET_IFNAME, ...
    setup: list[str] = field(default_factory=list)  # shell lines of the batch script, such as module load
    ft_restarts: int = 0  # above 0: by nvidia-resiliency-ext's ft_launcher, in place, before the job is requeued
    max_failures: int = 5  # in a row without a new checkpoint, before the job stops restarting
    health_check: bool = True  # of every node before training; a bad one is excluded and the job requeued
    all_reduce_check: bool = True  # of every node's ranks, and of all, after the health check
    min_free_gb: float = 10.0  # disk space the health check wants in output_dir
    min_write_mb_s: float = 20.0  # and speed of writing


@dataclass
class RunConfig:
    """One run. ``nemo-pre train experiment=NAME`` fills it; the resolved copy is saved with the run."""

    name: str = MISSING
    seed: int = 1234
    platform: str = "auto"  # auto | cpu | gpu
    output_dir: str = "runs/${name}"
    dry_run: bool = False
    init_from: str | None = None  # weights to start from: a former stage's checkpoint, or what `nemo-pre import` wrote
    resume: bool = True  # continue from the newest checkpoint in output_dir
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    experiment: Any = None  # set by the defaults list; the name of the experiment file
