"""The parts of a run's configuration: every field a user may set, with its unit, its default and what it may hold.

The YAML groups in ``recipes/`` are merged into these dataclasses by Hydra, so an unknown key or a value of
the wrong type is refused while composing. What a field may hold stands at the field (:mod:`nemo_pre.options`); what
one field alone cannot decide (does the layout divide the model, is the data there) is decided in
:mod:`nemo_pre.checks`. The whole is :class:`nemo_pre.config.run.RunConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from nemo_pre.options import choice, fraction, number, numbers, place, seed_number

VISION_FAMILIES = {
    "clip": "",
    "siglip": "SigLIP and SigLIP2",
    "dinov2": "",
    "aimv2": "",
    "aimv2_native": "native resolution",
    "qwen25_vl": "native resolution",
    "patch_mlp": "no layers, trained from scratch",
}

GPUS = ("a100", "h100", "h200", "b200")  # of which nemo_pre.planner.devices has the data sheets


@dataclass
class VisionConfig:
    """The vision tower: a ``transformers`` vision model, or an MLP on patches, and the resolution it is fed. Its
    weights are random, or come with ``init_from``."""

    family: str = choice("clip", VISION_FAMILIES)
    image_size: int = number(
        MISSING, least=0
    )  # pixels, square; with native resolution 0: an image keeps its aspect ratio
    patch_size: int = number(MISSING, least=1)  # pixels, square
    hidden_size: int = number(MISSING, least=1)
    # Of dinov2 a multiple of hidden_size; of patch_mlp the width between its two layers.
    intermediate_size: int = number(MISSING, least=1)
    num_layers: int = number(MISSING, least=0)  # of patch_mlp 0
    num_attention_heads: int = number(MISSING, least=1)  # of patch_mlp 1
    feature_layer: int = -2  # index into hidden_states: -2 is the output of the last layer but one
    drop_class_token: bool = True  # of clip and dinov2: language models get patches alone
    pooling_head: bool = True  # of siglip: whether it has the head behind its layers, which no features come from
    min_visual_tokens: int | None = number(None, least=1)  # of an image, native resolution only; smaller are enlarged
    max_visual_tokens: int | None = number(
        None, least=1
    )  # likewise; larger are reduced; at least four times the former
    window_size: int | None = number(None, least=1)  # of qwen25_vl: pixels, square, within which most layers attend
    full_attention_layers: list[int] | None = number(
        None, least=0
    )  # of qwen25_vl: from 0, those that attend to the whole image
    image_mean: list[float] = numbers((0.48145466, 0.4578275, 0.40821073))  # of red, green and blue, as the next
    image_std: list[float] = numbers((0.26862954, 0.26130258, 0.27577711), above=0)


@dataclass
class RopeScalingConfig:
    """How the frequencies of the rotary embedding are slowed down for longer sequences."""

    kind: str = choice(
        "none", {"none": "", "linear": "all, by factor", "llama3": "Llama 3.1: the slow ones, by factor"}
    )
    factor: float = number(1.0, above=0)
    low_freq_factor: float = number(1.0, above=0)  # of llama3, with the next two
    high_freq_factor: float = number(4.0, above=0)
    original_positions: int = number(8192, least=1)


@dataclass
class LanguageConfig:
    """The language model: a Llama- or Qwen2-shaped decoder. Its weights are random, or come with ``init_from``."""

    family: str = choice("llama", {"llama": "", "qwen2": "bias on the query, key and value projections"})
    num_layers: int = number(MISSING, least=1)
    hidden_size: int = number(MISSING, least=1)
    ffn_hidden_size: int = number(MISSING, least=1)
    num_attention_heads: int = number(MISSING, least=1)
    num_query_groups: int = number(MISSING, least=1)
    vocab_size: int = number(MISSING, least=1)  # tokenizer's size; padded to a multiple of 128 x TP inside the model
    rotary_base: float = number(10000.0, above=0)
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    max_position_embeddings: int | None = number(
        None, least=1
    )  # what an exported model states; null: data.sequence_length
    layernorm_epsilon: float = number(1e-5, above=0)
    tie_embeddings: bool = False  # the output layer is the embedding
    init_std: float = number(0.02, above=0)


@dataclass
class ModelConfig:
    name: str = MISSING  # of the recipe; exported models are called so
    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    projector: str = "mlp2x_gelu"  # two linear layers and a GELU, as LLaVA-1.5\'s
    attention: str = choice("causal", {"causal": "", "mixed": "visual tokens of one image see each other both ways"})
    attention_backend: str = choice(  # of mixed attention
        "auto",
        {
            "auto": "flex on a GPU, else dense",
            "dense": "a mask",
            "flex": "FlexAttention's blocks, GPU only",
            "split": "plain attention run by run",
        },
    )
    rope: str = choice("1d", {"1d": "", "2d": "row and column of a patch", "mrope": "Qwen2-VL's: time, row, column"})
    rope_sections: list[int] | None = number(None, least=0)  # frequencies per axis; null: 2d alternates, mrope 2:3:3
    tokenizer: str | None = place(None)  # HF tokenizer directory; null: the data's, else that of init_from


@dataclass
class BlendSource:
    """One prepared set of several that are trained on together."""

    path: str = place(MISSING)  # directory that `nemo-pre data ...` wrote
    weight: float = number(1.0, above=0)  # in proportion to which its samples are drawn


@dataclass
class DataConfig:
    name: str = MISSING  # of the recipe
    path: str = place(
        MISSING
    )  # directory that `nemo-pre data ...` wrote; with blend, of validation and tokenizer only
    blend: list[BlendSource] | None = None  # train on these instead of path's training split
    sequence_length: int = number(MISSING, least=1)  # tokens of text and images together; longer samples are cut
    num_workers: int = number(0, least=0)  # loader processes per rank
    shuffle_seed: int = seed_number(0)
    chat_template: str = choice(
        "plain",
        {
            "plain": "",
            "vicuna_v1": "as transformers tokenizes it",
            "llava_v1": "the same as LLaVA-1.5 tokenizes it, its images first in their turns",
            "caption": "the eos token ends it",
            "llava_caption": "LLaVA-1.5's, which a line break ends",
            "chatml": "",
            "qwen_vl": "",
            "llama3": "",
        },
    )
    image_resize: str = choice(
        "whole", {"whole": "aspect ratio lost", "crop": "CLIP's centre crop", "pad": 'LLaVA-1.5\'s "pad"'}
    )
    image_filter: str = choice("bicubic", {"bicubic": "CLIP, SigLIP", "bilinear": "SigLIP2"})
    # Of image_resize=crop: pixels of the shorter side before the middle is cut out, as DINOv2's 256 for 224; null: all
    # of it is kept.
    image_crop_from: int | None = number(None, least=1)
    max_tiles: int = number(
        1, least=1
    )  # of an image: its thumbnail and the cells of a grid, as LLaVA-NeXT's; 1, or 3 and more
    features: str | None = place(
        None
    )  # directory of `nemo-pre data features`: a frozen encoder's output instead of images
    on_error: str = choice("raise", ("raise", "skip"))  # what a sample that cannot be read does
    packing: bool = False  # several samples, isolated, in a sequence; batch sizes count sequences
    packing_window: int = number(1024, least=1)  # samples that are packed at a time
    record_samples: bool = False  # samples.jsonl: the names of the samples that each step trained on
    # What a resume does whose data state is another's.
    on_state_mismatch: str = choice("raise", {"raise": "", "restart": "the data, not the run"})


@dataclass
class ParallelConfig:
    tensor: int = number(1, least=1)
    pipeline: int = number(1, least=1)
    virtual_pipeline: int | None = number(None, least=1)  # model chunks per pipeline rank
    pipeline_layers: list[int] | None = number(
        None, least=0
    )  # decoder layers of each chunk, as a sample meets them; null: even
    context: int = number(1, least=1)
    sequence: bool = False  # sequence parallelism inside the tensor-parallel group
    data: int = number(1, least=1)
    distributed_optimizer: bool = True  # replicas share its states out among them (ZeRO-1)
    overlap_grad_reduce: bool | None = None  # during the backward pass; null: where there are replicas
    # What the backward pass computes again instead of keeping it; from the fastest to the smallest.
    recompute: str = choice("none", {"none": "", "selective": "core attention", "full": "whole decoder layers"})
    recompute_num_layers: int = number(1, least=1)  # that full recomputation takes together
    labelled_output: bool = False  # the output layer runs at tokens with a label alone: with one rank a sequence


@dataclass
class PrecisionConfig:
    """What parameters and activations are; gradients, master weights and moments are float32. With fp8_* the decoder's
    layers multiply matrices in FP8 (Transformer Engine, on Hopper and later)."""

    name: str = choice(MISSING, ("fp32", "bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise"))
    amax_history: int = number(1024, least=1)  # micro-batches whose largest values fp8_delayed scales by
    bf16_layers: int | None = number(
        None, least=0
    )  # at each end of the decoder without FP8; null: 1, none with fp8_delayed


@dataclass
class OptimConfig:
    """AdamW with a cosine schedule; a module's own learning rate overrides ``lr``, and 0 means 0."""

    lr: float = number(MISSING, above=0)  # the modules' rates are kept as multiples of it
    lr_vision: float | None = number(None, least=0)
    lr_projector: float | None = number(None, least=0)
    lr_language: float | None = number(None, least=0)
    lr_heads: float | None = number(None, least=0)
    min_lr_ratio: float = fraction(0.0)  # of each module's own peak
    warmup_ratio: float = fraction(0.03)  # of max_steps
    weight_decay: float = number(0.0, least=0)
    beta1: float = fraction(0.9)
    beta2: float = fraction(0.999)
    eps: float = number(1e-8, above=0)
    clip_grad: float = number(1.0, least=0)
    freeze_vision: bool = False  # not trained, as the next two; a rate of 0 keeps optimizer states
    freeze_projector: bool = False  # likewise
    freeze_language: bool = False  # likewise; its embeddings and output layer too


@dataclass
class TrainerConfig:
    max_steps: int = number(MISSING, least=1)  # optimizer steps
    global_batch_size: int = number(MISSING, least=1)  # samples
    micro_batch_size: int = number(MISSING, least=1)  # samples
    log_every: int = number(1, least=1)  # steps
    log_grad_norms_every: int | None = number(
        None, least=1
    )  # steps; gradient norm of each loss term, at a backward pass per term
    log_similarity_every: int | None = number(
        None, least=1
    )  # steps; mean cosine between an image's visual tokens, layer by layer
    log_diagnostics_every: int | None = number(
        None, least=1
    )  # steps; probes, contrast and more of a few pictures, layer by layer
    wandb_project: str | None = None  # of Weights & Biases, which gets the metrics too; WANDB_* variables as it says
    val_every: int | None = number(None, least=1)  # steps; null: at the end only
    val_samples: int = number(256, least=0)  # scenes whose answers are generated for exact match
    checkpoint_every: int | None = number(None, least=1)  # steps; null: at the end only
    keep_checkpoints: int = number(2, least=1)
    async_checkpoint: bool = False  # write in the background while training goes on
    ignore_memory_estimate: bool = False  # train although nemo-pre plan's count says that a rank's memory is too small
    rank_timeout: int = number(
        3600, least=1
    )  # seconds a collective may wait before the job is ended; more than hang_timeout
    hang_timeout: int = number(
        1800, least=1
    )  # seconds without a finished step after which every rank prints its stacks and ends
    nan_action: str = choice("stop", ("stop", "roll_back"))  # at a loss or gradient that is not finite
    spike_action: str = choice(
        "none", {"none": "", "stop": "", "roll_back": "to the last checkpoint, leaving out the batches since"}
    )
    spike_factor: float = number(
        3.0, above=1
    )  # a loss is a spike above so many times the median of the last spike_window steps
    spike_window: int = number(100, least=1)  # steps; a fifth of them must be there
    max_roll_backs: int = number(10, least=1)  # of a run; the next one stops it


@dataclass
class ClusterConfig:
    """Where a run's ranks are, and for `nemo-pre submit` what a Slurm site wants to know: one file per site in
    recipes/cluster. How many tasks and GPUs a node gets follows from the layout and ``nodes``."""

    name: str = "local"  # of the recipe
    nodes: int = number(1, least=1)
    devices_per_node: int | None = number(None, least=1)  # null: as many as the layout needs
    gpu: str | None = choice(None, GPUS)  # of its nodes; null: none, or another, whose memory gpu_memory_gb is
    gpu_memory_gb: float | None = number(
        None, above=0
    )  # GB (10^9 bytes) of each GPU; null: as gpu's data sheet has it
    partition: str | None = None  # as sbatch --partition takes it
    account: str | None = None  # as sbatch --account takes it
    qos: str | None = None  # as sbatch --qos takes it
    time_limit: str | None = None  # days-hours:minutes:seconds; null: the partition's
    warning_seconds: int = number(120, least=1)  # before the time limit a checkpoint is written and the job requeued
    cpus_per_task: int | None = number(None, least=1)
    memory_per_node: str | None = None  # as sbatch --mem takes it
    exclude: list[str] = field(default_factory=list)  # nodes
    sbatch_options: list[str] = field(default_factory=list)  # further ones, such as --exclusive
    container_image: str | None = place(None)  # for pyxis and enroot; null: no container
    container_mounts: list[str] = field(default_factory=list)  # FROM:TO; the working directory is always mounted
    python: str | None = place(None)  # of the virtual environment; null: the submitting one, in a container python3
    environment: dict[str, str] = field(default_factory=dict)  # NCCL_*, GLOO_SOCKET_IFNAME, ...
    setup: list[str] = field(default_factory=list)  # shell lines of the batch script, such as module load
    ft_restarts: int = number(
        0, least=0
    )  # above 0: by nvidia-resiliency-ext's ft_launcher, in place, before the job is requeued
    max_failures: int = number(5, least=1)  # in a row without a new checkpoint, before the job stops restarting
    health_check: bool = True  # of every node before training; a bad one is excluded and the job requeued
    all_reduce_check: bool = True  # of every node's ranks, and of all, after the health check
    min_free_gb: float = number(10.0, least=0)  # disk space the health check wants in output_dir
    min_write_mb_s: float = number(20.0, least=0)  # and speed of writing
