"""Everything about a run that can be decided before a model is built: refused with one sentence, or warned of.

:func:`check_run` is what ``nemo-pre train`` asks first and all that ``dry_run=true`` asks. The rules stand in small
functions, one per part of the config, in the order in which they are applied; nothing here imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from nemo_pre.checks.memory import MemoryEstimate, estimate_memory, goes_to_gpus
from nemo_pre.checks.pixels import check_pixels
from nemo_pre.checks.precision import ignored_precision_options, precision_of_this_machine, precision_problems
from nemo_pre.checks.presence import check_presence
from nemo_pre.checks.visual import ignored_visual_options, visual_problems
from nemo_pre.config.derived import num_visual_tokens, padded_vocab_size, world_size
from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import DataConfig
from nemo_pre.config.vision_families import is_native
from nemo_pre.config.vision_towers import tower_problems
from nemo_pre.launch.environment import external_job, uses_gpu, visible_gpus
from nemo_pre.objectives.registry import enabled, known, wanted_targets
from nemo_pre.objectives.target import Target
from nemo_pre.options import value_problems
from nemo_pre.planner.chunks import chunks_of_stages, layers_problem
from nemo_pre.run_files.checkpoints import data_of
from nemo_pre.run_files.continuing import Continuation, begin_anew, continuation


@dataclass
class Report:
    """What a checked run will look like, the options in it that have no effect, and what it goes on from."""

    config: RunConfig
    ranks: int
    num_microbatches: int
    memory: MemoryEstimate
    data: str
    warnings: list[str]
    continuation: Continuation | None

    def _encoder(self) -> list[str]:
        config = self.config
        if config.vision_from is None or config.init_from is not None or self.continuation is not None:
            return []
        return [f"  encoder     weights of vision_from={config.vision_from}{', frozen' * config.optim.freeze_vision}"]

    def summary(self) -> str:
        layout, trainer = self.config.parallel, self.config.trainer
        chunks = f" x VPP{layout.virtual_pipeline}" if layout.virtual_pipeline else ""
        sequence = " + SP" if layout.sequence and layout.tensor > 1 else ""
        terms = ["language model", *(objective.summary() for objective in enabled(self.config))]
        features = self.config.data.features
        continues = [] if self.continuation is None else self.continuation.sentences()
        device = "GPU" if goes_to_gpus(self.config, starts_here=not self.config.dry_run) else "CPU"
        return "\n".join(
            [
                f"run {self.config.name} -> {self.config.output_dir}",
                f"  layout      {self.ranks} rank(s) on {device}: "
                f"TP{layout.tensor}{sequence} x PP{layout.pipeline}{chunks} x CP{layout.context} x DP{layout.data}, "
                f"{self.config.precision.name}",
                f"  batch       {trainer.global_batch_size} samples = {self.num_microbatches} micro-batches of "
                f"{trainer.micro_batch_size} on {layout.data} replica(s), {trainer.max_steps} steps",
                f"  sequence    {self.config.data.sequence_length} tokens, "
                f"{'up to ' if is_native(self.config.model.vision) else ''}"
                f"{num_visual_tokens(self.config.model)} of them per image",
                f"  objective   {' + '.join(terms)}",
                *self._encoder(),
                f"  data        {self.data}" + (f", features from {features}" if features else ""),
                f"  memory      {self.memory.summary()}",
                *(f"  {sentence}" for sentence in continues),
            ]
        )


def check_run(config: RunConfig, former: RunConfig | None = None) -> Report:
    """Check a composed run: its options, layout, batch and objective, then what must lie on disk.

    Args:
        config: the run.
        former: the run that is queued before it, whose checkpoint ``init_from`` is going to be.

    Raises:
        ValueError: one sentence that says what to change.
    """
    warnings = check_options(config)
    memory, too_little = check_memory(config)
    continues = continuation(config)
    data = check_presence(config, former, continues.checkpoint if continues is not None else None)
    warnings += check_pixels(config)
    _check_blend(config)
    if continues is not None:
        continues.config.model.tokenizer = config.model.tokenizer  # which may have been found
        _check_same_samples(config, continues)
    if config.data.features is not None:
        from nemo_pre.features.check import check_features

        warnings += check_features(config)
    for target in wanted_targets(config).values():
        if target.features is not None:
            from nemo_pre.features.check import check_target_features

            warnings += check_target_features(config, target)
    warnings += too_little
    layout = config.parallel
    return Report(
        config=config,
        ranks=world_size(layout),
        num_microbatches=config.trainer.global_batch_size // (config.trainer.micro_batch_size * layout.data),
        memory=memory,
        data=data,
        warnings=warnings,
        continuation=continues,
    )


def check_memory(config: RunConfig) -> tuple[MemoryEstimate, list[str]]:
    """What the run's fullest rank needs; and as a warning that it is more than there is, where
    ``trainer.ignore_memory_estimate`` allows it.

    Raises:
        ValueError: it is more than there is.
    """
    estimate = estimate_memory(config, starts_here=not config.dry_run)
    problem = estimate.problem()
    if problem is not None and not config.trainer.ignore_memory_estimate:
        raise ValueError(problem)
    return estimate, [problem] if problem is not None else []


def _check_blend(config: RunConfig) -> None:
    """The prepared sets that are trained on instead of ``data.path``'s training split."""
    from nemo_pre.checks.data import check_data
    from nemo_pre.data.manifest import check_training_size

    manifests = [check_data(source.path, splits=("train",)) for source in config.data.blend or []]
    if manifests:
        check_training_size(manifests, config.trainer.global_batch_size)


def _check_same_samples(config: RunConfig, continues: Continuation) -> None:
    """A run goes on with the samples it counts; ranks look at the rows too that these are packed into."""
    from nemo_pre.data.manifest import read_manifest
    from nemo_pre.data.sampler import PACKED, samples_fingerprint

    trained_on = data_of(continues.checkpoint)
    if trained_on is None or continues.complete or config.data.on_state_mismatch == "restart":
        return
    sources = [(source.path, source.weight) for source in config.data.blend or []] or [(config.data.path, 1.0)]
    found = samples_fingerprint(
        [read_manifest(path).fingerprint for path, _ in sources], [each for _, each in sources]
    )
    if found != trained_on.partition(PACKED)[0]:
        raise ValueError(
            f"{config.output_dir}, at step {continues.step}, was trained on other samples than those of "
            f"{', '.join(path for path, _ in sources)}: give it the same, begin the data anew with "
            f"data.on_state_mismatch=restart, or start a new run from its weights by adding "
            f"{begin_anew(config)}."
        )


def check_options(config: RunConfig) -> list[str]:
    """The part of :func:`check_run` that looks at no file; returns the warnings.

    Raises:
        ValueError: one sentence that says what to change.
    """
    for problem in _problems(config):
        raise ValueError(problem)
    return list(_ignored_options(config))


def _problems(config: RunConfig) -> Iterator[str]:
    """Every reason to refuse the run, the most basic first; later rules rely on the former."""
    yield from _values(config)
    yield from _model_shape(config)
    yield from _layout(config)
    yield from _sequence(config)
    yield from _batch(config)
    yield from _roll_backs(config)
    yield from visual_problems(config)
    for objective in enabled(config):
        yield from objective.problems()
    yield from _features(config)
    yield from precision_problems(config)
    yield from _machines(config)


# --- single values --------------------------------------------------------------------------------------------------


def _values(config: RunConfig) -> Iterator[str]:
    """What a field's own rule refuses (:mod:`nemo_pre.options`), the colours' number, and the projector's pattern."""
    yield from value_problems(config)
    for name in ("image_mean", "image_std"):
        colours = getattr(config.model.vision, name)
        if len(colours) != 3:
            yield f"model.vision.{name}={colours} must be three numbers, of red, green and blue."
    projector = config.model.projector
    if not re.fullmatch(r"mlp[1-9]\d*x_gelu|mcore_mlp|mcore_affine", projector):
        yield f"model.projector={projector} is unknown: choose mlp<depth>x_gelu, mcore_mlp or mcore_affine."


# --- the model and its layout ---------------------------------------------------------------------------------------


def _model_shape(config: RunConfig) -> Iterator[str]:
    vision, language, optim = config.model.vision, config.model.language, config.optim
    yield from tower_problems(vision)
    for name, part in (("vision", vision), ("language", language)):
        if part.hidden_size % part.num_attention_heads:
            yield (
                f"model.{name}.hidden_size={part.hidden_size} must be a multiple of "
                f"model.{name}.num_attention_heads={part.num_attention_heads}."
            )
    if language.num_attention_heads % language.num_query_groups:
        yield (
            f"model.language.num_attention_heads={language.num_attention_heads} must be a multiple of "
            f"model.language.num_query_groups={language.num_query_groups}."
        )
    if optim.freeze_vision and optim.freeze_projector and optim.freeze_language:
        yield (
            "Nothing would be trained: set one of optim.freeze_vision, freeze_projector and freeze_language to false."
        )


def _layout(config: RunConfig) -> Iterator[str]:
    layout, language = config.parallel, config.model.language
    for name, size in (
        ("num_attention_heads", language.num_attention_heads),
        ("num_query_groups", language.num_query_groups),
        ("ffn_hidden_size", language.ffn_hidden_size),
    ):
        if size % layout.tensor:
            yield f"parallel.tensor={layout.tensor} must divide model.language.{name}={size}."
    padded = padded_vocab_size(language.vocab_size)
    if padded % layout.tensor:
        yield f"parallel.tensor={layout.tensor} must divide the vocabulary, which is padded to {padded}."
    if layout.virtual_pipeline is not None and layout.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline={layout.virtual_pipeline} needs more than one pipeline stage: "
            f"raise parallel.pipeline or set parallel.virtual_pipeline=null."
        )
    if layout.virtual_pipeline == 1:
        yield "parallel.virtual_pipeline=1 is no interleaving: set it to null, or to 2 or more."
    if layout.labelled_output and layout.tensor * layout.context > 1:
        yield (
            f"parallel.labelled_output=true takes sequences that one rank has whole: set it to false, or "
            f"parallel.tensor and parallel.context to 1 (they are {layout.tensor} and {layout.context})."
        )
    problem = layers_problem(config)
    if problem is not None:
        yield problem
    sizes = {len(chunk.layers) for stage in chunks_of_stages(config) for chunk in stage}
    if layout.recompute == "full" and any(size % layout.recompute_num_layers for size in sizes):
        yield (
            f"parallel.recompute_num_layers={layout.recompute_num_layers} must divide the "
            f"{' and '.join(map(str, sorted(sizes)))} layers of a pipeline chunk."
        )


def _sequence(config: RunConfig) -> Iterator[str]:
    layout, length, visual = config.parallel, config.data.sequence_length, num_visual_tokens(config.model)
    factor = (2 * layout.context if layout.context > 1 else 1) * (layout.tensor if layout.sequence else 1)
    if length % factor:
        parts = [
            *(["2 x parallel.context"] if layout.context > 1 else []),
            *(["parallel.tensor"] if layout.sequence else []),
        ]
        yield f"data.sequence_length={length} must be a multiple of {factor} ({' x '.join(parts)})."
    tiles = config.data.max_tiles
    if tiles == 2:
        yield "data.max_tiles=2 is a thumbnail and a grid of one cell: set it to 1, or to 3 or more."
    if tiles > 1 and config.trainer.val_samples:
        yield (
            f"data.max_tiles={tiles} cannot be validated by generation, which gives every image one tile: set "
            f"trainer.val_samples=0."
        )
    if tiles > 1 and config.data.packing:
        yield f"data.packing needs one tile an image, not data.max_tiles={tiles}: lengths are measured without images."
    if visual + 1 > length - 1:
        limit = "max_visual_tokens" if is_native(config.model.vision) else "image_size"
        yield (
            f"data.sequence_length={length} leaves no room for text beside an image of {visual} visual tokens: "
            f"raise it, or lower model.vision.{limit}."
        )


def _features(config: RunConfig) -> Iterator[str]:
    for target in wanted_targets(config).values():
        if target.features is not None:
            yield from _target_problems(config, target)
    data = config.data
    if data.features is None:
        return
    if not config.optim.freeze_vision:
        yield "data.features is what a frozen encoder gives: set optim.freeze_vision=true, or data.features=null."
    if data.max_tiles > 1:
        yield f"data.features holds one tile an image, not data.max_tiles={data.max_tiles}: set one of them back."
    if is_native(config.model.vision):
        yield "data.features holds as many tokens for every image, unlike native resolution: set data.features=null."
    if config.trainer.log_diagnostics_every:
        yield (
            "trainer.log_diagnostics_every looks at pictures through the encoder, which data.features leaves out: set "
            "one of them to null."
        )


def _target_problems(config: RunConfig, target: Target) -> Iterator[str]:
    """Why the run cannot read features of an objective's frozen model."""
    option = target.option("features")
    if config.data.max_tiles > 1:
        yield f"{option} holds one tile an image, not data.max_tiles={config.data.max_tiles}: set one of them back."
    if is_native(config.model.vision):
        yield f"{option} holds as many tokens for every image, unlike native resolution: set it to null."


def _batch(config: RunConfig) -> Iterator[str]:
    layout, trainer = config.parallel, config.trainer
    per_pass = trainer.micro_batch_size * layout.data
    if trainer.global_batch_size % per_pass:
        yield (
            f"trainer.global_batch_size={trainer.global_batch_size} must be a multiple of {per_pass} "
            f"(trainer.micro_batch_size x parallel.data)."
        )
    num_microbatches = trainer.global_batch_size // per_pass
    if layout.virtual_pipeline and num_microbatches % layout.pipeline:
        yield (
            f"parallel.virtual_pipeline needs a number of micro-batches that is a multiple of "
            f"parallel.pipeline={layout.pipeline}, not {num_microbatches}: change trainer.global_batch_size or "
            f"micro_batch_size."
        )


# --- rolling back --------------------------------------------------------------------------------------------------


def _roll_backs(config: RunConfig) -> Iterator[str]:
    trainer = config.trainer
    if "roll_back" in (trainer.nan_action, trainer.spike_action) and not config.resume:
        yield "A roll-back continues from a checkpoint, which resume=false forbids: leave resume=true."
    if trainer.nan_action == "roll_back" and not config.optim.clip_grad:
        yield "trainer.nan_action=roll_back looks at the gradient's norm, which needs optim.clip_grad above 0."


# --- the machines ---------------------------------------------------------------------------------------------------


def _machines(config: RunConfig) -> Iterator[str]:
    cluster, ranks, gpus = config.cluster, world_size(config.parallel), visible_gpus()
    if ranks % cluster.nodes:
        yield f"The layout's {ranks} ranks cannot be divided among cluster.nodes={cluster.nodes}: change one of them."
    if cluster.devices_per_node is not None and ranks != cluster.nodes * cluster.devices_per_node:
        yield (
            f"The layout has {ranks} ranks (tensor x pipeline x context x data) but the cluster "
            f"{cluster.nodes} x {cluster.devices_per_node} devices: change parallel, or set "
            f"cluster.devices_per_node=null to use a part of each node."
        )
    started_here = external_job(os.environ) is None and cluster.nodes == 1
    if started_here and not config.dry_run:
        yield from precision_of_this_machine(config)
    if config.platform == "gpu" and gpus == 0 and started_here and not config.dry_run:
        yield "platform=gpu, but this machine shows no NVIDIA GPU: set platform=cpu or auto."
    if started_here and not config.dry_run and uses_gpu(config.platform) and 0 < gpus < ranks:
        yield (
            f"The layout has {ranks} ranks but this machine {gpus} GPU(s): choose a smaller layout "
            f"(parallel=single) or platform=cpu."
        )


# --- options without effect -----------------------------------------------------------------------------------------


def _ignored_options(config: RunConfig) -> Iterator[str]:
    layout, optim, cluster = config.parallel, config.optim, config.cluster
    if layout.sequence and layout.tensor == 1:
        yield "parallel.sequence has no effect with parallel.tensor=1."
    if layout.overlap_grad_reduce and layout.data * layout.context == 1:
        yield "parallel.overlap_grad_reduce has no effect with parallel.data=1 and parallel.context=1."
    if layout.recompute != "full" and layout.recompute_num_layers != 1:
        yield f"parallel.recompute_num_layers has no effect with parallel.recompute={layout.recompute}."
    for module in ("vision", "projector", "language"):
        if getattr(optim, f"freeze_{module}") and getattr(optim, f"lr_{module}") is not None:
            yield f"optim.lr_{module} has no effect with optim.freeze_{module}=true."
    if config.data.chat_template == "plain" and config.data.name != "digits":
        yield (
            "data.chat_template=plain sets no marks between turns: set the language model's own, such as chatml "
            "(Qwen2.5), llama3 or vicuna_v1."
        )
    if not config.data.packing and config.data.packing_window != DataConfig().packing_window:
        yield "data.packing_window has no effect with data.packing=false."
    if config.data.name != "digits" and config.data.num_workers == 0:
        yield "data.num_workers=0 reads and decodes images in the training process; a few workers are faster."
    if layout.tensor > (cluster.devices_per_node or layout.tensor):
        yield "parallel.tensor is larger than cluster.devices_per_node: tensor parallelism across nodes is slow."
    yield from ignored_precision_options(config)
    yield from ignored_visual_options(config)
    for objective in enabled(config):
        yield from objective.ignored()
    for name, kind in known().items():
        options = getattr(config.objective, name)
        if not options.enabled:
            yield from kind.ignored_when_off(options)
    if config.trainer.rank_timeout <= config.trainer.hang_timeout:
        yield (
            f"trainer.hang_timeout={config.trainer.hang_timeout} has no effect where trainer.rank_timeout="
            f"{config.trainer.rank_timeout} ends waiting ranks before."
        )
    if optim.lr_heads is not None and not any(objective.trained for objective in enabled(config)):
        with_heads = next(name for name, objective in known().items() if objective.trained)
        yield f"optim.lr_heads has no effect without an objective that has heads, such as objective.{with_heads}."
