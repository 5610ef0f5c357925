"""What a training loop calls: the objectives of a run, their plan of a step, and their metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from nemo_pre.config.run import RunConfig
from nemo_pre.core.chunks import chunk_of, refuse_what_it_cannot_carry
from nemo_pre.core.foreign import ForeignChunk
from nemo_pre.neva.model import VisualNevaConfig
from nemo_pre.objectives.registry import enabled_options
from nemo_pre.objectives.scale import StepPlan
from nemo_pre.terms.step_planner import StepPlanner
from nemo_pre.terms.term import Term
from nemo_pre.terms.training import VisualChunk


class Objectives:
    """The enabled objectives of a training loop on Megatron-Core, on this rank. Every rank of the job makes one.

    It is a :class:`nemo_pre.terms.training.Training`. Methods are called in the order in which they stand here.

    Args:
        options: the part ``objective`` of a run's configuration.
        seed: of heads' initial weights and of whatever else objectives draw.
        max_steps: optimizer steps of the whole run.
        steps_done: optimizer steps done, where the run continues.

    Raises:
        ValueError: an option has a value that it cannot have.

    Attributes:
        chunks: the rank's model chunks as terms see them; from :meth:`attach` on.
        plan: of the step at hand; None outside of one.
        sequence_length: what Megatron's schedule is told as ``seq_length`` in the step at hand.
    """

    def __init__(self, options: Any, seed: int, max_steps: int, steps_done: int = 0) -> None:
        self._enabled = list(enabled_options(options))
        self._terms: list[Term] = [kind.term_class()(own, seed) for kind, own in self._enabled]
        self._planner = StepPlanner(options.lm_weight)
        self.max_steps, self.steps_done = max_steps, steps_done
        self.chunks: list[VisualChunk] = []
        self.plan: StepPlan | None = None
        self.sequence_length = 0
        self._prepared: Any = None
        self._installed = False

    @classmethod
    def of_run(cls, run: RunConfig, steps_done: int = 0) -> Objectives:
        """The objectives of a whole run's configuration."""
        return cls(run.objective, run.seed, run.trainer.max_steps, steps_done)

    # --- before training --------------------------------------------------------------------------------------------

    def prepare(self, config: VisualNevaConfig) -> None:
        """Ask for what the objectives need of chunks of our own, before these are built.

        :func:`nemo_pre.core.model.build_chunks` calls it. LaVer needs it; what the others need, :meth:`attach` adds to
        chunks that are there.

        Raises:
            ValueError: the model cannot be what an objective needs.
        """
        self._prepare(config)

    def attach(self, modules: Iterable[nn.Module | ForeignChunk], **facts: Any) -> None:
        """Give the rank's chunks what the objectives train, and listen to their forward passes.

        Call it before the chunks are wrapped, so that heads get gradient buffers, a place in the optimizer's groups
        and keys in checkpoints like any other parameter.

        Args:
            modules: the rank's chunks in the order of their virtual pipeline stages, not wrapped by anything:
                :class:`nemo_pre.neva.model.MCoreVisualNevaModel`, Megatron-Core's ``LLaVAModel``, or another model in
                a :class:`nemo_pre.core.foreign.ForeignChunk` of yours.
            facts: of a ``LLaVAModel`` what it does not know itself, see :class:`nemo_pre.core.llava.LLaVAChunk`.

        Raises:
            ValueError: a chunk is no model that objectives know, or cannot carry one of them.
        """
        if self.chunks:
            raise ValueError("The objectives are attached already: make new Objectives for another model.")
        chunks = [chunk_of(module, **facts) for module in modules]
        if not chunks:
            raise ValueError("There is no model chunk to attach objectives to: give those of this rank.")
        config = chunks[0].config
        for chunk in chunks:
            if isinstance(chunk, ForeignChunk):  # one model, of which terms ask something once
                chunk.config = config
        refuse_what_it_cannot_carry(chunks[0], self._enabled)
        if self._prepared is not config:
            if self._prepared is not None:
                raise ValueError("The objectives were prepared for another model: attach them to chunks of that one.")
            self._prepare(config)
            if config.branch:
                raise ValueError(
                    "An objective with a sequence of its own beside the samples must be known before the model is "
                    "built: call Objectives.prepare(config) first, as nemo_pre.core.build_chunks does."
                )
            for part in config.parts.values():
                for chunk in chunks:
                    part.add_to(chunk)
        self.chunks = chunks
        for term in self._terms:
            self._planner.add(term)
        self._observe(False)

    def install(self) -> None:
        """Begin, when the initial weights are there; those of a checkpoint that is resumed are loaded after this.

        Process groups are made here: every rank must call it, after Megatron's model-parallel groups are there.
        """
        self._refuse_unattached()
        if self._installed:
            return
        for term in self._terms:
            term.install(self)
        self._installed = True

    # --- one step ---------------------------------------------------------------------------------------------------

    def start_step(self, batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Plan a step: lay out its micro-batches, count what losses are divided by, fix the terms' weights.

        Args:
            batches: all micro-batches of this data-parallel rank, in the order in which they will run, each with
                ``tokens`` and ``labels`` int64 ``[B, T]`` (-200 stands for an image), ``loss_mask`` ``[B, T]`` and
                ``num_media_tiles``, the number of tiles of each image; on the CPU.

        Returns:
            The same, each with its place in the step as ``micro_batch``, which our own chunks take.
        """
        self._refuse_unattached()
        if not self._installed:
            raise ValueError("The objectives are not installed: call Objectives.install() before the first step.")
        if not batches:
            raise ValueError("A step needs at least one micro-batch.")
        batches = list(batches)
        self.plan, self.sequence_length = self._planner.plan(self, batches)
        for chunk in self.chunks:
            if isinstance(chunk, ForeignChunk):
                chunk.start_step(batches)
        for term in self._terms:
            term.start_step()
        self._observe(True)
        return batches

    def end_step(self) -> dict[str, float]:
        """The metrics of the step, the same on every rank, by their names; after the last backward pass."""
        plan = self._current_plan()
        self._observe(False)
        found: dict[str, float] = {}
        for term in self._terms:
            found |= {name: float(value) for name, value in term.end_step(plan).items()}
        self.plan = None
        return found

    def forget_step(self) -> None:
        """Drop a step that is not going to count, such as one that Megatron runs again to compare its results. Then
        start it anew, with the batches of :meth:`start_step`."""
        self._current_plan()
        self._observe(False)
        for term in self._terms:
            term.forget_step()
        self.plan = None

    def after_update(self) -> None:
        """Follow the parameters after the optimizer has moved them."""
        self.steps_done += 1
        for term in self._terms:
            term.after_update(self)

    # --- after training ---------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Wait for what is under way, before the last checkpoint is read."""
        for term in self._terms:
            term.finish()

    def remove(self) -> None:
        """Take everything off the chunks again but the parameters they were given."""
        for term in self._terms:
            term.remove()
        for chunk in self.chunks:
            if isinstance(chunk, ForeignChunk):
                chunk.release()
        self.chunks, self._installed = [], False

    # ----------------------------------------------------------------------------------------------------------------

    def _prepare(self, config: Any) -> None:
        for term in self._terms:
            term.prepare(config)
        self._prepared = config

    def _observe(self, observed: bool) -> None:
        """Whether forward passes are those of a step; nobody sees others, such as an evaluation's."""
        for chunk in self.chunks:
            chunk.observed = observed

    def _current_plan(self) -> StepPlan:
        if self.plan is None:
            raise ValueError("No step is under way: call Objectives.start_step first.")
        return self.plan

    def _refuse_unattached(self) -> None:
        if not self.chunks:
            raise ValueError("The objectives have no model: call Objectives.attach with this rank's chunks first.")
