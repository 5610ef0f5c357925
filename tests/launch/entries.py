"""Toy ranks for :mod:`tests.launch.test_launch`, and the program that launches one of them.

python -m tests.launch.entries FUNCTION OUTPUT_DIR OVERRIDE ...
"""

import os
import signal
import sys
import time
from pathlib import Path

from nemo_pre.config.run import RunConfig

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


def report(config: RunConfig) -> None:
    """Each rank writes what it was told and says so on its output."""
    values = {name: os.environ.get(name) for name in VARIABLES}
    (Path(config.output_dir) / f"report{values['RANK']}").write_text(repr((os.getpid(), os.getppid(), values)))
    print(f"rank {values['RANK']} speaks", flush=True)


def libraries_speak(config: RunConfig) -> None:
    """Every rank says something of its own, and what libraries say in all the ways they have."""
    import logging
    import warnings

    print("step 1/2", flush=True)
    ours = logging.getLogger("nemo_pre.somewhere")
    ours.info("resuming")
    ours.warning("a damaged checkpoint")
    ours.debug("library: a detail")
    logging.getLogger("library").warning("library: by a logger")
    logging.getLogger("library.loud").error("a fault of theirs")
    warnings.warn("library: a warning", stacklevel=1)
    os.write(1, b"library: compiled code\n")
    os.write(2, b"library: compiled code's error\n")
    raise RuntimeError("the reactor is cold")


def rank_1_raises(config: RunConfig) -> None:
    _started(config)
    if _rank() == 1:
        raise RuntimeError("the reactor is cold")
    time.sleep(60)


def rank_1_complains(config: RunConfig) -> None:
    if _rank() == 1:
        raise ValueError("turn the other knob")


def rank_1_is_killed(config: RunConfig) -> None:
    _started(config)
    if _rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def rank_1_exits(config: RunConfig) -> None:
    if _rank() == 1:
        os._exit(7)


def rank_0_ignores_everything(config: RunConfig) -> None:
    """Rank 1 raises; rank 0 hangs and does not listen to SIGTERM."""
    _started(config)
    if _rank() == 1:
        raise RuntimeError("the reactor is cold")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1)


def rank_0_is_heard_of_before_rank_1_is_killed(config: RunConfig) -> None:
    """As when gloo tells rank 0 of the lost connection before the launcher learns of rank 1's death."""
    _started(config)
    if _rank() == 0:
        raise RuntimeError("connection closed by peer")
    while not _is_gone(Path(config.output_dir) / "pid0"):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(config: RunConfig) -> None:
    _started(config)
    time.sleep(60)


def sleep_with_a_helper(config: RunConfig) -> None:
    """As with a loader's worker or a checkpoint's writer: a process that the rank forked, deaf to SIGTERM."""
    helper = os.fork()
    if not helper:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
        os._exit(0)
    (Path(config.output_dir) / f"helper{_rank()}").write_text(str(helper))
    time.sleep(60)


def sleep_with_a_loader(config: RunConfig) -> None:
    """Its loader's worker, started as a rank starts processes, has done what it was asked, and waits for more."""
    from torch.utils.data import DataLoader

    from nemo_pre.orphans import end_with_the_loader

    loader = DataLoader(range(4), num_workers=1, persistent_workers=True, worker_init_fn=end_with_the_loader)
    assert len(list(loader)) == 4
    _started(config)
    time.sleep(60)


def _rank() -> int:
    return int(os.environ["RANK"])


def _started(config: RunConfig) -> None:
    (Path(config.output_dir) / f"pid{_rank()}").write_text(str(os.getpid()))


def _is_gone(pid_file: Path) -> bool:
    return pid_file.exists() and bool(pid := pid_file.read_text()) and not Path("/proc", pid).exists()


def main(function: str, output_dir: str, *overrides: str) -> int:
    from nemo_pre.config.compose import compose_run
    from nemo_pre.launch.ranks import RankFailure, launch

    config = compose_run(["experiment=digits_tiny", "platform=cpu", f"output_dir={output_dir}", *overrides])
    try:
        preload, own_words = os.environ.get("PRELOAD"), "OWN_WORDS" in os.environ
        launch(config, f"tests.launch.entries:{function}", preload=preload, own_words=own_words)
    except RankFailure as failure:
        print(f"{failure}\n{failure.traceback}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
