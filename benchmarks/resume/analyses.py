"""Kill analyses at random moments, start them again, and compare every table with that of an uninterrupted run.

python -m benchmarks.resume.analyses --kills 60 --seed 0
python -m benchmarks.resume.analyses --kills 4 --only cknna    # only settings whose name contains this word

Each analysis runs once without interruption. Then runs follow that are killed by SIGKILL up to four times, at moments
drawn evenly from the time that the uninterrupted run took, and are at last left alone until they end. Of two ranks,
half of the time only one is killed, and the other must then end by itself. The processes are forks of one that has
imported everything, so that the kills come while an analysis works. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from benchmarks.resume.compare import content, unequal
from tests.conftest import ROOT, Process, recipe, start
from workbench.runs import RUN_FILE

DATA = ["--data", "shapes:val", "--limit", "12", "--batch_size", "2"]
ANALYSES = {
    "cknna": ["--vfm", "efficientnet-lite0", "--null", "10", "--k", "3"],
    "attention": ["--null", "10"],
    "permutation": ["--permutations", "1", "--layers", "1", "2"],
    "tokens": ["--vfm", "efficientnet-lite0", "--null", "10", "--umap_images", "0"],
}
HANGING = 120.0  # a rank that should have ended counts as hanging after this many seconds


@dataclass
class Outcome:
    """What happened to one analysis with a number of ranks.

    Attributes:
        runs: number of runs that were killed and started again until they ended.
        kills: kills of all ranks, and of one rank of two.
        different: what differed from the uninterrupted run.
    """

    runs: int = 0
    kills: int = 0
    of_one: int = 0
    different: list[str] = field(default_factory=list)


def processes(name: str, model: Path, out: Path, ranks: int) -> list[Process]:
    """Start the analysis in chunks of two images."""
    words = ["tests.in_small_chunks", name, "--model", str(model), *DATA, *ANALYSES[name], "--output_dir", str(out)]
    if ranks == 1:
        return [start(*words)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [start(*words, cwd=ROOT, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(ranks)]


def ended(started: list[Process]) -> list[int]:
    """Return the exit codes of all ranks, -1 for one that hangs."""
    deadline = time.monotonic() + HANGING
    while any(process.poll() is None for process in started) and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    return [-1 if process.wait() == -signal.SIGKILL else process.wait() for process in started]


def killed(started: list[Process], moment: float, alone: int | None) -> bool:
    """Kill all ranks, or the one called `alone`, after `moment` seconds; return whether they were still running."""
    deadline = time.monotonic() + moment
    while time.monotonic() < deadline and any(process.poll() is None for process in started):
        time.sleep(0.002)
    running = all(process.poll() is None for process in started)
    for rank, process in enumerate(started):
        if running and alone in (None, rank):
            process.send_signal(signal.SIGKILL)
    return running


def differences(one: Path, other: Path) -> list[str]:
    """Return what differs between the tables and tensors of the only runs in two folders."""
    folders = [[path.parent for path in out.glob(f"*/{RUN_FILE}")] for out in (one, other)]
    if [*map(len, folders)] != [1, 1]:
        return [f"{len(folders[1])} runs: expected 1"]
    (first,), (second,) = folders
    names = [
        {p.name for p in folder.iterdir() if p.suffix in (".parquet", ".safetensors")} for folder in (first, second)
    ]
    wrong = [f"{name} is missing or left over" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        if name.endswith(".parquet"):
            equal = pd.read_parquet(first / name).equals(pd.read_parquet(second / name))
        else:
            equal = not [*unequal(content(first / name), content(second / name))]
        wrong += [f"{name} differs"] * (not equal)
    return wrong


def campaign(names: list[str], model: Path, folder: Path, kills: int, seed: int) -> dict[str, Outcome]:
    """Kill `kills` times, one run after another, going round the analyses with one rank and with two."""
    rng = random.Random(seed)
    settings = [(name, ranks) for name in names for ranks in (1, 2)]
    outcomes = {f"{name}, {ranks} rank{'s' * (ranks > 1)}": Outcome() for name, ranks in settings}
    whole: dict[str, tuple[Path, float]] = {}
    done = number = 0
    while done < kills:
        name, ranks = settings[number % len(settings)]
        outcome = [*outcomes.values()][number % len(settings)]
        if name not in whole:
            began = time.monotonic()
            assert ended(processes(name, model, folder / name, 1)) == [0]
            whole[name] = folder / name, time.monotonic() - began
        reference, seconds = whole[name]
        out = folder / f"run-{number}"
        for _ in range(min(rng.randint(1, 4), kills - done)):
            started, alone = processes(name, model, out, ranks), rng.randrange(2) if rng.random() < 0.5 else None
            alone = alone if ranks > 1 else None
            if not killed(started, rng.uniform(0, seconds), alone):
                ended(started)
                break
            codes = ended(started)
            done, outcome.kills = done + 1, outcome.kills + 1
            if alone is not None:
                outcome.of_one += 1
                survivor = codes[1 - alone]
                outcome.different += [f"the other rank ended with {survivor}"] * (survivor not in (0, 2))
        last = ended(processes(name, model, out, ranks))
        wrong = [f"ended with {last}"] if any(last) else differences(reference, out)
        outcome.runs, outcome.different, number = outcome.runs + 1, outcome.different + wrong, number + 1
        print(f"{done:4} {name}, {ranks}: {'; '.join(wrong) or 'equal'}", file=sys.stderr, flush=True)
        shutil.rmtree(out)
    return outcomes


def main(argv: list[str]) -> None:
    """Run the campaign and print its table; exit with 1 if a run that was killed differs from the uninterrupted one."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resume.analyses",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=60, help="number of kills over all settings")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--only", default="", help="only analyses whose name contains this word; all by default")
    options = parser.parse_args(argv)
    names = [name for name in ANALYSES if options.only in name]
    if not names:
        parser.error(f"--only is '{options.only}': expected a part of {', '.join(ANALYSES)}")
    if options.kills < 1:
        parser.error(f"--kills is {options.kills}: expected at least 1")
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        few = ["--optim.steps", "2", "--data.limit_train", "8", "--data.limit_val", "4", "--model.layers", "2"]
        (training,) = [start("trainer", recipe("stage1"), *few, "--output_dir", str(folder / "model"))]
        assert training.wait() == 0, training.err
        outcomes = campaign(names, folder / "model", folder, options.kills, options.seed)
    rows = [
        {
            "analysis": name,
            "runs": outcome.runs,
            "kills": outcome.kills,
            "of one rank": outcome.of_one,
            "equal": "NO" if outcome.different else "yes",
        }
        for name, outcome in outcomes.items()
    ]
    print(pd.DataFrame(rows).to_string(index=False))
    for name, outcome in outcomes.items():
        for sentence in outcome.different:
            print(f"{name}: {sentence}")
    sys.exit(any(outcome.different for outcome in outcomes.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
