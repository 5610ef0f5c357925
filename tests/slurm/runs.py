"""Options of small runs for the test bed, and what is read of them."""

from __future__ import annotations

from pathlib import Path

from slurm.testbed.bed import TestBed, last_step, wait_for

SHARED = "node5"  # where the jobs run that nothing happens to


def words(output: Path | str, data: Path, *more: str) -> list[str]:
    return [
        "cluster=slurm_testbed", f"output_dir={output}", f"data.path={data}", "platform=cpu",
        "model.language.num_layers=2", "model.vision.num_layers=2", "trainer.micro_batch_size=4",
        "trainer.log_every=1", "trainer.val_samples=0", "data.record_samples=true", *more,
    ]  # fmt: skip


def one_rank(output: Path | str, data: Path, *more: str) -> list[str]:
    """A run of three steps."""
    small = ["parallel=single", "cluster.nodes=1", "cluster.health_check=false", "trainer.global_batch_size=8"]
    place = f"cluster.sbatch_options=['--nodelist={SHARED}']"
    return words(output, data, *small, place, "trainer.max_steps=3", "trainer.checkpoint_every=3", *more)


def log_of(run: Path, job: str, restart: int = 0) -> str:
    """What the ranks of one start of a job said."""
    return (run / "slurm" / f"{job}.{restart}.log").read_text()


def wait_for_step(bed: TestBed, job: str, run: Path, step: int) -> None:
    def there() -> bool:
        assert bed.state(job) not in ("FAILED", "CANCELLED", "TIMEOUT", "COMPLETED"), complaint()
        return last_step(run) >= step

    def complaint() -> str:
        logs = sorted((run / "slurm").glob(f"{job}.*"))
        return f"job {job} is {bed.state(job)} at step {last_step(run)}\n" + "\n".join(
            f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs
        )

    wait_for(there, 1200, complaint)
