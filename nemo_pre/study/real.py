"""``nemo-pre study real``: what becomes of visual tokens in a language model that has read, and what helps?"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from nemo_pre.config.run import RunConfig
from nemo_pre.options import Count, CountOrNone, PathText, rule_of
from nemo_pre.study.arms import ALIGN, Arm, chosen
from nemo_pre.study.kept import read_kept
from nemo_pre.study.naming import IMAGE_SIZE
from nemo_pre.study.prepare_real import (
    ENCODER,
    FEATURES,
    Starts,
    layers_of,
    most_frequent,
    start_directory,
    write_text,
)
from nemo_pre.study.real_arms import RANDOM, real_arms, real_depths, real_first_stages, run_order
from nemo_pre.study.runs import RunFailed, StudyRun

FIRST_RATE, RATE = 1e-3, 2e-4
BATCH = 16  # scenes, where nothing is learned
# With their 36 visual tokens scenes of two questions are 70 to 142 tokens long. In rows of 160 of their own two fifths
# would be padding: packed, a row holds about three of them.
ROW_LENGTH = 256
PACKED = "data.packing=true", f"data.sequence_length={ROW_LENGTH}"
SEES = "model=of_init_from", f"model.vision.image_size={IMAGE_SIZE}"
# Beside other work, at the lowest priority, a step may take an hour.
PATIENT = "trainer.hang_timeout=86400", "trainer.rank_timeout=90000"
OUTPUT = "parallel.labelled_output=true"  # a fourth of a step's work is the output layer at tokens without a label


def study(
    options: Sequence[str] = (),
    data: PathText = "data/emoji",
    language: PathText = "checkpoints/smollm2",
    runs: PathText = "runs/real-study",
    out: PathText = "experiments/real-study",
    page: PathText = "docs/study.md",
    text: PathText | None = None,
    arms: str | None = None,
    seeds: Count = 3,
    other_seeds: Count = 1,
    encoder_steps: Count = 6000,
    first_steps: Count = 120,
    steps: Count = 120,
    rows: Count = 3,
    num_images: Count = 240,
    num_fit: Count = 600,
    val_samples: Count = 128,
    at_a_time: Count = 1,
    most_runs: CountOrNone | None = None,
    precision: str = "bf16",
    platform: Annotated[str, rule_of(RunConfig, "platform")] = "auto",
    dry_run: bool = False,
) -> None:
    """Train and diagnose LLaVA's two stages on a language model that has read, then write numbers, figures and page.

      nemo-pre data emoji PACKAGES out=data/emoji num_scenes=40000 held_out_style=google num_concepts=250 \
          questions=name,colour,category,count,text
      nemo-pre smollm2 out=checkpoints/smollm2
      nemo-pre study real                                          everything, or whatever is not there yet of it
      nemo-pre study real most_runs=0                              the page and its numbers anew, also while it runs

    An encoder learns to name pictures (nemo-pre study encoder, unless RUNS/encoder is there) and is frozen; its
    features are computed once. The first stage trains the projector alone for first_steps steps, the second projector
    and language model for steps steps, each of rows packed rows of about three scenes, from the first stage of its
    seed. Main arms (baseline, pre, mixed_2d, laver, random) have seeds 1 to seeds, the others 1 to other_seeds; random
    has the same language model with random weights. Models are diagnosed before the first stage, after it, and at the
    end of the second, the baseline along it, too: probes fitted on num_fit scenes of the training styles and tested on
    num_images of the style held out, layers 0, 1/4, 1/2, 3/4 and last, and the loss on plain text (text=FILE; null:
    prose of Python's own help). val_samples questions are answered at the end, by the baseline at every quarter. Runs
    come in an order in which every beginning of the list answers something; most_runs ends after so many. options are
    overrides for all runs.

    Killed and started again with the same options it goes on where it was. OUT's summary keeps the numbers of what is
    finished, so that a run whose directory is gone is not repeated. On one GPU at_a_time=4 platform=gpu does all of it
    in the memory of one.

    Raises:
        ValueError: an option that cannot work, or a summary in OUT of other settings or of another encoder.
        RankFailure: a run failed; the summary is written without it.
    """
    from nemo_pre.data.manifest import read_manifest
    from nemo_pre.launch.ranks import RankFailure
    from nemo_pre.study.real_page import write_real
    from nemo_pre.study.real_summary import FORMAT, FORMAT_VERSION
    from nemo_pre.study.schedule import alone, do_all, most_at_a_time

    if steps % 4:
        raise ValueError(f"steps={steps}: give a multiple of 4, a quarter of which is measured at.")
    manifest = read_manifest(data, "data")
    if manifest.dataset != "emoji" or "val_style" not in manifest.shards:
        raise ValueError(f"data={data} has no held-out style: prepare it with nemo-pre data emoji.")
    num_layers = layers_of(Path(language))
    asked = chosen(real_arms(num_layers, steps), arms)
    depths = real_depths(num_layers)
    root = Path(runs)
    own_text = Path(text) if text is not None else root / "text.txt"
    measure = {
        "objects": "true",
        "layers": ",".join(str(layer) for layer in depths.values()),
        "text": str(own_text),
        "num_images": str(num_images),
        "num_fit": str(num_fit),
        "batch_size": str(BATCH),
        "chat_template": "chatml",
        "precision": precision,
        "platform": platform,
    }
    plan = Plan(
        root,
        data,
        [*SEES, *PACKED, f"data.path={data}", f"precision={precision}", f"platform={platform}", OUTPUT, *options],
        tuple(f"{name}={value}" for name, value in measure.items()),
        first_steps,
        steps,
        rows,
        val_samples,
    )
    for arm in asked:
        for seed in range(1, (seeds if arm.main else other_seeds) + 1):
            plan.add(arm, seed)
    settings = {
        "data": manifest.raw["parameters"],
        "encoder_steps": encoder_steps,
        "first_steps": first_steps,
        "steps": steps,
        "rows": rows,
        "row_length": ROW_LENGTH,
        "train_samples": manifest.num_samples("train"),
        "val_samples": val_samples,
        "num_images": num_images,
        "num_fit": num_fit,
        "precision": precision,
        "text": text and str(text),
        "options": list(options),
        "layers": depths,
        "most_frequent": most_frequent(data, val_samples),
    }
    kept = read_kept(Path(out), settings, FORMAT, FORMAT_VERSION)
    kept.check_encoder(_read_encoder(root))
    all_arms = real_arms(num_layers, steps)
    plan.add_others(kept.finished, all_arms)
    ordered = plan.ordered(all_arms)
    todo = plan.needed([run for run in ordered if run.measured and not kept.has(run)], ordered)
    for run in ordered:
        run.check()
    if dry_run:
        for run in todo:
            print(f"{run.directory}: nemo-pre train {' '.join(run.overrides)}" if run.overrides else run.directory)
        return
    failures: list[str] = []
    if todo and (most_runs is None or most_runs > 0):
        with alone(root):
            if text is None:
                write_text(own_text)
            _, on_gpu = most_at_a_time(platform)
            starts = Starts(root, Path(language), Path(data), plan.common, encoder_steps, platform)
            try:
                starts.prepare(sorted({(run.seed, plan.is_random(run)) for run in todo}))
            except RunFailed as failure:
                raise RankFailure(str(failure)) from failure
            kept.check_encoder(_read_encoder(root))
            failures = do_all(todo[:most_runs], plan.starts_from, at_a_time, on_gpu)
    encoder = _read_encoder(root) or (kept.summary["settings"]["encoder"] if kept.summary else None)
    write_real(
        [*real_first_stages(), *all_arms], ordered, {**settings, "encoder": encoder}, Path(out), Path(page), kept
    )
    second = [run for run in ordered if run.measured]
    finished = sum(run.is_finished or kept.has(run) for run in second)
    print(
        f"{finished} of {len(second)} second stages are there: {Path(out)}, {page}; next: nemo-pre study real goes on"
    )
    if failures:
        raise RankFailure(f"{len(failures)} of {len(todo)} runs failed: {' '.join(failures)}")


def _read_encoder(root: Path) -> dict[str, Any] | None:
    from nemo_pre.study.naming import DESCRIPTION

    file = root / ENCODER / DESCRIPTION
    return json.loads(file.read_text()) if file.is_file() else None


@dataclass
class Plan:
    """The study's runs: models before the first stage, first stages, and what goes on from them."""

    root: Path
    data: str
    common: list[str]
    diagnose: tuple[str, ...]
    first_steps: int
    steps: int
    rows: int
    val_samples: int
    starts_from: dict[StudyRun, StudyRun] = field(default_factory=dict)
    _first: dict[tuple[str, int], StudyRun] = field(default_factory=dict)
    _before: dict[tuple[str, int], StudyRun] = field(default_factory=dict)
    _second: list[StudyRun] = field(default_factory=list)

    def add(self, arm: Arm, seed: int) -> None:
        """A second stage, with the first stage and the start it needs."""
        stage = next(each for each in real_first_stages() if each.name == arm.first_stage)
        key = (stage.name, seed)
        if key not in self._first:
            self._first[key] = self._first_stage(stage, seed)
        kind = "random_start" if stage.name.endswith(RANDOM) else "start"
        if (kind, seed) not in self._before:
            self._before[kind, seed] = self._start(kind, seed)
        every = self.steps // 4
        overrides = (
            *self._overrides(arm, seed, 1000 + seed, self.steps, RATE),
            f"init_from={self._first[key].directory / 'checkpoints'}",
            f"trainer.checkpoint_every={every}",
            "trainer.keep_checkpoints=5",
            f"trainer.val_every={every if arm.followed else self.steps}",
            f"trainer.log_grad_norms_every={every}",
            f"trainer.val_samples={self.val_samples}",
        )
        measured = (every, self.steps // 2, self.steps) if arm.followed else (self.steps,)
        run = StudyRun(
            arm.name,
            seed,
            self.root / f"{arm.name}_seed{seed}",
            overrides,
            self.steps,
            arm.cost,
            f"{self.data}/val_style",
            self.diagnose,
            measured,
            keeps_weights=False,
        )
        self._second.append(run)
        self.starts_from[run] = self._first[key]

    def add_others(self, named: Collection[tuple[str, int]], arms: Sequence[Arm]) -> None:
        """Second stages, (arm, seed), as far as they are not there yet.

        Raises:
            ValueError: there is no such arm.
        """
        there = {(run.arm, run.seed) for run in self._second}
        by_name = {arm.name: arm for arm in arms}
        for name, seed in sorted({*named} - there):
            if name not in by_name:
                raise ValueError(
                    f"The summary has numbers of an arm {name!r}, which is none: give another out=DIRECTORY."
                )
            self.add(by_name[name], seed)

    def needed(self, wanted: Sequence[StudyRun], ordered: Sequence[StudyRun]) -> list[StudyRun]:
        """What of ``ordered`` is not finished of the ``wanted`` second stages and what these start from."""
        found = {*wanted, *(run for second in wanted for run in self._before_it(second))}
        return [run for run in ordered if run in found and not run.is_finished]

    def _before_it(self, second: StudyRun) -> tuple[StudyRun, StudyRun]:
        """The start that a second stage is compared with, and its first stage."""
        kind = "random_start" if self.is_random(second) else "start"
        return self._before[kind, second.seed], self.starts_from[second]

    def is_random(self, run: StudyRun) -> bool:
        return RANDOM in run.arm

    def ordered(self, arms: Sequence[Arm]) -> list[StudyRun]:
        """Second stages in :func:`run_order`, each behind what it needs and the start it is compared with."""
        places = {arm.name: (arm, place) for place, arm in enumerate(arms)}
        found: list[StudyRun] = []
        for run in sorted(self._second, key=lambda run: run_order(places[run.arm][0], run.seed, places[run.arm][1])):
            found += [each for each in self._before_it(run) if each not in found]
            found.append(run)
        return found

    def _first_stage(self, stage: Arm, seed: int) -> StudyRun:
        start = start_directory(self.root, seed, stage.name.endswith(RANDOM))
        overrides = (
            *self._overrides(stage, seed, seed, self.first_steps, FIRST_RATE),
            f"init_from={start}",
            ALIGN,
            f"trainer.checkpoint_every={max(1, self.first_steps // 4)}",
            "trainer.keep_checkpoints=1",
            "trainer.val_samples=0",
        )
        directory = self.root / f"{stage.name}_seed{seed}"
        data = f"{self.data}/val_style"
        return StudyRun(stage.name, seed, directory, overrides, self.first_steps, 0.7, data, self.diagnose)

    def _start(self, kind: str, seed: int) -> StudyRun:
        model = start_directory(self.root, seed, kind.startswith(RANDOM))
        directory = self.root / f"{kind}_measured_seed{seed}"
        return StudyRun(kind, seed, directory, (), 0, 0.0, f"{self.data}/val_style", self.diagnose, model=model)

    def _overrides(self, arm: Arm, seed: int, order: int, steps: int, rate: float) -> tuple[str, ...]:
        return (
            "experiment=smollm2_135m_emoji_pre",
            *self.common,
            *arm.overrides,
            f"data.features={self.root / FEATURES}",
            "optim.freeze_vision=true",
            f"optim.lr={rate}",
            f"seed={seed}",
            f"data.shuffle_seed={order}",
            f"trainer.max_steps={steps}",
            f"trainer.global_batch_size={self.rows}",
            f"trainer.micro_batch_size={self.rows}",
            "trainer.log_every=1",
            "data.num_workers=0",
            *PATIENT,
        )
