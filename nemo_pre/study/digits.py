"""``nemo-pre study digits``: do visual tokens degrade on digit scenes, and do PRe and LaVer help?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from nemo_pre.config.run import RunConfig
from nemo_pre.options import CountOrNone, PathText, rule_of
from nemo_pre.study.arms import ALIGN, FROZEN, SECOND_STAGE, Arm, chosen, depths, digits_arms, first_stages
from nemo_pre.study.runs import RunFailed, StudyRun

RECORDS = 6  # diagnostics during a run


def study(
    options: Sequence[str] = (),
    out: PathText = "experiments/digits-study",
    page: PathText = "experiments/digits-study/README.md",
    runs: PathText = "runs/digits-study",
    data: PathText = "data/digits",
    arms: str | None = None,
    seeds: int = 3,
    ablation_seeds: int = 1,
    encoder_steps: int = 1500,
    language_steps: int = 0,
    first_steps: int = 600,
    steps: int = 600,
    num_images: int = 512,
    num_fit: CountOrNone = 2048,
    val_samples: CountOrNone = 950,
    at_a_time: int | None = None,
    platform: Annotated[str, rule_of(RunConfig, "platform")] = "auto",
    dry_run: bool = False,
) -> None:
    """Train and diagnose every arm of the digits study, then write its numbers, figures and page.

      nemo-pre study digits                                        everything
      nemo-pre study digits arms=baseline,pre,laver seeds=2        a part of it
      nemo-pre study digits model.language.num_layers=16 runs=runs/deep out=experiments/deep page=docs/deep.md
      nemo-pre study digits language_steps=1500 runs=runs/read out=experiments/read page=docs/read.md

    An encoder learns for encoder_steps steps to name what each patch shows and is frozen then (encoder_steps=0: the
    first stage trains one from random weights). A first stage trains projector and language model from random weights
    for first_steps steps; each arm goes on from it, on other samples, for steps steps (first_steps=0: every arm by
    itself). With language_steps a language model first learns, for that many steps, the questions and answers without
    their pictures; the first stage then trains the projector alone, as published ones do. Main arms have seeds 1 to
    seeds, the others 1 to ablation_seeds. Every run is diagnosed on the first num_images of the val split, probes are
    fitted on num_fit of the train split, and val_samples questions are answered. options are overrides for all runs.
    at_a_time runs go in parallel, as many as there are cores or GPUs unless given.

    Killed and started again with the same options it goes on where it was; finished runs are not repeated. out gets
    summary.json and figures; remarks.md there is put into the page. dry_run lists the runs and does nothing.

    Raises:
        ValueError: an option that cannot work.
        RankFailure: a run failed; the summary is written without it.
    """
    positive = {"seeds": seeds, "ablation_seeds": ablation_seeds, "steps": steps, "num_images": num_images}
    for name, value in {**positive, "at_a_time": 1 if at_a_time is None else at_a_time}.items():
        if value < 1:
            raise ValueError(f"{name}={value}: give 1 or more.")
    before = {"encoder_steps": encoder_steps, "language_steps": language_steps, "first_steps": first_steps}
    for name, value in before.items():
        if value < 0:
            raise ValueError(f"{name}={value}: give 0 or more.")
    if language_steps and not (encoder_steps and first_steps):
        raise ValueError("language_steps needs an encoder and a first stage: give encoder_steps and first_steps too.")
    from nemo_pre.config.compose import compose_run
    from nemo_pre.data.manifest import read_manifest
    from nemo_pre.launch.ranks import RankFailure
    from nemo_pre.study.encoder import prepare_encoder, prepare_start, start_directory
    from nemo_pre.study.figures import draw
    from nemo_pre.study.page import write_page
    from nemo_pre.study.schedule import alone, do_all, most_at_a_time
    from nemo_pre.study.summary import refuse_loss, summarise, write_summary

    manifest = read_manifest(data, "data")
    run_config = compose_run(["experiment=digits_tiny", f"data.path={data}", *options])
    num_layers = run_config.model.language.num_layers
    asked = chosen(digits_arms(num_layers), arms)
    common = [
        f"data.path={data}",
        f"trainer.val_samples={val_samples}",
        f"platform={platform}",
        "trainer.log_every=10",
    ]
    common += ["trainer.keep_checkpoints=1", "trainer.micro_batch_size=16"]
    plan = _Plan(Path(runs), common, list(options), data, (f"num_images={num_images}", f"num_fit={num_fit}"), platform)
    if encoder_steps:
        aligned = [ALIGN] if language_steps else []
        plan.starts = lambda seed: [f"init_from={start_directory(Path(runs), seed)}", FROZEN, *aligned]
    for arm in asked:
        for seed in range(1, (seeds if arm.main else ablation_seeds) + 1):
            plan.add(arm, seed, first_steps, steps)
    ordered = plan.ordered()
    if dry_run:
        for run in ordered:
            print(f"{run.directory}: nemo-pre train {' '.join(run.overrides)}")
        return
    settings = {
        "language_steps": language_steps,
        "first_steps": first_steps,
        "steps": steps,
        "train_samples": manifest.num_samples("train"),
        "val_samples": val_samples,
        "num_images": num_images,
        "num_fit": num_fit,
        "options": list(options),
        "layers": depths(num_layers),
    }
    refuse_loss(Path(out), settings, {(run.arm, run.seed) for run in ordered})
    most, on_gpu = most_at_a_time(platform)
    with alone(Path(runs)):
        for run in ordered:
            run.check()
        encoder = None
        if encoder_steps:
            device = "cuda" if on_gpu else "cpu"
            encoder = prepare_encoder(run_config, data, Path(runs), encoder_steps, device)
            try:
                for seed in sorted({run.seed for run in ordered}):
                    prepare_start(run_config, Path(runs), seed, language_steps, device)
            except RunFailed as failure:
                raise RankFailure(str(failure)) from failure
        failures = do_all(ordered, plan.starts_from, at_a_time or most, on_gpu)
    told = encoder and {name: encoder[name] for name in ("steps", "accuracy")}
    finished = [run for run in ordered if run.is_finished]
    if finished:
        summary = summarise(
            [*(first_stages() if first_steps else []), *asked], finished, {"encoder": told, **settings}
        )
        write_summary(summary, Path(out))
        draw(summary, Path(out))
        write_page(summary, Path(out), Path(page))
        print(f"{len(finished)} runs: {Path(out) / 'summary.json'}, {page}; next: open the page")
    if failures:
        raise RankFailure(f"{len(failures)} of {len(ordered)} runs failed: {' '.join(failures)}")


class _Plan:
    """The runs of a study, each first stage once."""

    def __init__(
        self, root: Path, common: list[str], options: list[str], data: str, diagnose: tuple[str, ...], platform: str
    ) -> None:
        self._root, self._common, self._options, self._data = root, common, options, data
        self._diagnose = (*diagnose, f"platform={platform}")
        self._first: dict[tuple[str, int], StudyRun] = {}
        self._second: list[StudyRun] = []
        self.starts_from: dict[StudyRun, StudyRun] = {}
        self.starts: Callable[[int], list[str]] = lambda seed: []  # overrides of what nothing comes before

    def add(self, arm: Arm, seed: int, first_steps: int, steps: int) -> None:
        if not first_steps:
            self._second.append(self._run(arm, seed, steps, seed, self.starts(seed)))
            return
        stage = next(each for each in first_stages() if each.name == arm.first_stage)
        before = self._first.setdefault(
            (stage.name, seed), self._run(stage, seed, first_steps, seed, self.starts(seed))
        )
        further = [*SECOND_STAGE, f"init_from={before.directory / 'checkpoints'}"]
        run = self._run(arm, seed, steps, 1000 + seed, further)  # it sees the samples in another order
        self._second.append(run)
        self.starts_from[run] = before

    def ordered(self) -> list[StudyRun]:
        """First stages first, and low seeds before high ones, so that an early look has every arm."""
        return [*sorted(self._first.values(), key=_seed), *sorted(self._second, key=_seed)]

    def _run(self, arm: Arm, seed: int, steps: int, order: int, more: list[str]) -> StudyRun:
        every = max(1, steps // RECORDS)
        intervals = [f"trainer.{name}={every}" for name in ("log_diagnostics_every", "checkpoint_every")]
        seeds = [f"seed={seed}", f"data.shuffle_seed={order}"]
        overrides = (*arm.overrides, *self._common, *seeds, f"trainer.max_steps={steps}", *intervals, *more)
        directory = self._root / f"{arm.name}_seed{seed}"
        return StudyRun(
            arm.name, seed, directory, (*overrides, *self._options), steps, arm.cost, self._data, self._diagnose
        )


def _seed(run: Any) -> int:
    return int(run.seed)
