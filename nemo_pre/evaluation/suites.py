"""The papers' benchmarks as lmms-eval's tasks and metrics."""

from __future__ import annotations

from dataclasses import dataclass

PERCENT = 100.0  # lmms-eval reports fractions where the papers print per cent


@dataclass(frozen=True)
class Benchmark:
    """A number that a paper prints.

    Attributes:
        name: our key, which ``published.yaml`` uses too.
        label: the papers' name.
        task, metric: lmms-eval's; the metric with its filter, as in its results.
        scale: from lmms-eval's number to the paper's.
        judge: a language model judges the answers, through an API that needs a key.
    """

    name: str
    label: str
    task: str
    metric: str
    scale: float = PERCENT
    judge: bool = False


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("gqa", "GQA", "gqa", "exact_match,none"),
        Benchmark("mmmu", "MMMU", "mmmu_val", "mmmu_acc,none"),
        Benchmark("ai2d", "AI2D", "ai2d", "exact_match,flexible-extract"),
        Benchmark("mmstar", "MMStar", "mmstar", "average,none"),
        Benchmark("sqa_image", "SQA-I", "scienceqa_img", "exact_match,none"),
        Benchmark("textvqa", "TextVQA", "textvqa_val", "exact_match,none"),
        Benchmark("ocrbench", "OCRBench", "ocrbench", "ocrbench_accuracy,none", scale=1000.0),
        Benchmark("realworldqa", "RealWorldQA", "realworldqa", "exact_match,none"),
        Benchmark("mmvp", "MMVP", "mmvp", "mmvp_pair_accuracy,none"),
        Benchmark("mme", "MME perception", "mme", "mme_perception_score,none", scale=1.0),
        Benchmark("mmbench_en", "MMBench EN", "mmbench_en_dev", "gpt_eval_score,none", scale=1.0, judge=True),
        Benchmark("mmbench_cn", "MMBench CN", "mmbench_cn_dev", "gpt_eval_score,none", scale=1.0, judge=True),
        Benchmark("seed_image", "SEED image", "seedbench", "seed_image,none"),
        Benchmark("pope_accuracy", "POPE accuracy", "pope", "pope_accuracy,none"),
        Benchmark("pope_f1", "POPE F1", "pope", "pope_f1_score,none"),
        Benchmark("cv_bench_2d", "CV-Bench 2D", "cv_bench_2d", "cv_bench_acc,none"),
        Benchmark("hallusion", "HallusionBench", "hallusion_bench_image", "aAcc,none", scale=1.0, judge=True),
        Benchmark("chartqa", "ChartQA", "chartqa", "relaxed_overall,none"),
        Benchmark("digits", "digits", "digits", "exact_match,none"),
        *(
            Benchmark(f"digits_{kind}", f"digits, {kind}", "digits", f"exact_match_{kind},none")
            for kind in ("count", "exists", "place", "larger", "read", "text")
        ),
    )
}

# The PRe paper uses lmms-eval, but Cambrian-1's scripts for MMVP; LaVer's authors use VLMEvalKit. Of LaVer's 17
# benchmarks those are here whose names are public.
SUITES = {
    "pre": (
        *("gqa", "mmmu", "ai2d", "mmstar", "sqa_image", "textvqa", "ocrbench", "realworldqa", "mmvp"),
        *("mme", "mmbench_en", "mmbench_cn", "seed_image", "pope_accuracy", "pope_f1"),
    ),
    "laver": ("ocrbench", "mmvp", "realworldqa", "cv_bench_2d", "ai2d", "hallusion", "chartqa", "textvqa"),
    "digits": tuple(name for name in BENCHMARKS if name.startswith("digits")),
}


def suite_tasks(suite: str) -> list[str]:
    """lmms-eval's tasks of a suite, each once.

    Raises:
        ValueError: there is no such suite.
    """
    if suite not in SUITES:
        raise ValueError(f"suite={suite} is unknown: choose one of {', '.join(SUITES)}, or name tasks=A,B.")
    return list(dict.fromkeys(BENCHMARKS[name].task for name in SUITES[suite]))


def benchmarks_of(task: str) -> list[Benchmark]:
    """What the papers print of an lmms-eval task; empty where they print nothing of it."""
    return [benchmark for benchmark in BENCHMARKS.values() if benchmark.task == task]
