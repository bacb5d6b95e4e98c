"""Kill trainings at random moments, resume them, and compare every file with that of an uninterrupted run.

python -m benchmarks.resume --kills 100 --seed 0
python -m benchmarks.resume --kills 4 --only viral        # only settings whose name contains this word
python -m benchmarks.resume --kills 300 --forked          # runs as forks of one process, ten times faster

Each setting is trained once without interruption. Then "lives" follow: a run is killed by SIGKILL, resumed, killed
again, up to four times, and at last left alone until it ends. Half of the kills come by the clock (one in five of these
during start-up, the others evenly from the first file to the end). The other half come at the k-th change that a
process makes on the disk, for a random k: half of these before the change happens, half as soon as it is noticed. Of
two processes sometimes only one is killed, and the other must then end by itself. `cold` settings start without cached
features, in their own cache. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from benchmarks.resume.life import COMMAND, HOOK, ROOT, Kill, Reference, Setting, live, reference
from tests.students import world

SMALL = f"""
base: {ROOT}/trainer/recipes/shapes_viral.yaml
stage1: null
model: {{layers: 2, width: 32, ffn: 64}}
data: {{limit_train: 12, limit_val: 4}}
alignment: {{layer: [1, 2], hidden: 16}}
optim: {{steps: 6, warmup: 1, batch_size: 2}}
log_every: 1
eval_every: 3
save_every: 2
keep_checkpoints: 2
"""
STUDENT = [
    "--alignment.objective",
    "cosine",
    "--alignment.layer",
    "2",
    "--alignment.hidden",
    "8",
    "--optim.steps",
    "6",
    "--eval_every",
    "3",
]
LORA = ["--model.train", "lora", "--model.lora.rank", "2", "--model.lora.dropout", "0.1"]


@dataclass
class Outcome:
    """What happened to a setting.

    Attributes:
        lives: number of runs that were killed and resumed until they ended.
        kills: all kills of these runs.
        different: what differed from the uninterrupted run at the end.
    """

    lives: int = 0
    kills: list[Kill] = field(default_factory=list)
    different: list[str] = field(default_factory=list)


def settings(folder: Path) -> list[Setting]:
    """Return all settings of the campaign, after building a small model for conversations below `folder`."""
    _, flags = world(folder / "world")
    recipe = folder / "recipe.yaml"  # everything else is set by flags
    recipe.write_text("log_every: 1\nsave_every: 2\n")
    student = [str(recipe), *flags, *STUDENT]
    (folder / "small.yaml").write_text(SMALL)
    small = [str(folder / "small.yaml")]
    parts = ["--optim.accumulation", "2"]
    two = ["--optim.global_batch", "8"]
    stage = folder / "tiny_stage1.yaml"
    stage.write_text(
        f"base: {ROOT}/trainer/recipes/shapes_stage1.yaml\noptim: {{steps: 4, batch_size: 2}}\nlog_every:"
        " 2\nsave_every: 2\neval_every: 2\n"
    )
    return [
        Setting("viral, full, cold", small, cold=True),
        Setting("viral, full, accumulated", [*small, *parts]),
        Setting("viral, LoRA, accumulated, cold", [*small, *LORA, *parts], cold=True),
        Setting("viral, full, after a first stage", [*small, "--stage1", str(stage)]),
        Setting("student, full, accumulated, cold", [*student, *parts], cold=True),
        Setting("student, LoRA", [*student, *LORA]),
        Setting("viral, full, 2 processes, cold", small, 2, cold=True),
        Setting("viral, LoRA, accumulated, 2 processes", [*small, *LORA, *two], 2),
        Setting("student, full, 2 processes", student, 2),
        Setting("student, LoRA, accumulated, 2 processes, cold", [*student, *LORA, *two], 2, cold=True),
        Setting("viral, full, 2 processes, FSDP2", small, 2, launch="fsdp"),
        Setting("student, LoRA, 2 processes, FSDP2", [*student, *LORA], 2, launch="fsdp"),
    ]


def campaign(chosen: list[Setting], folder: Path, kills: int, seed: int, *, forked: bool) -> dict[str, Outcome]:
    """Kill `kills` times, one life after another, going round the settings."""
    rng, hooks = random.Random(seed), None if forked else folder / "hooks"
    if hooks is not None:
        hooks.mkdir()
        (hooks / "sitecustomize.py").write_text(HOOK + COMMAND)
    whole: dict[str, Reference] = {}
    outcomes = {setting.name: Outcome() for setting in chosen}
    number = done = 0
    while done < kills:
        setting = chosen[number % len(chosen)]
        if setting.name not in whole:
            whole[setting.name] = reference(setting, folder / f"whole-{number}", hooks)
        place = folder / f"life-{number}"
        hits, wrong = live(setting, whole[setting.name], place, hooks, rng, min(rng.randint(1, 4), kills - done))
        outcome = outcomes[setting.name]
        outcome.lives += 1
        outcome.kills += hits
        outcome.different += wrong
        number, done = number + 1, done + len(hits)
        moments = [hit.stage + (f" (one process, {hit.ended_after:.0f} s)" if hit.alone else "") for hit in hits]
        verdict = "; ".join(wrong) if wrong else "equal"
        print(
            f"{done:4} {setting.name}: {', '.join(moments) or 'never'}: {verdict}",
            file=sys.stderr,
            flush=True,
        )
        if not wrong:
            shutil.rmtree(place)
    return outcomes


def table(outcomes: dict[str, Outcome]) -> pd.DataFrame:
    """Return a table with one row for each setting, and one for all."""
    rows = []
    whole = Outcome(
        sum(o.lives for o in outcomes.values()),
        [k for o in outcomes.values() for k in o.kills],
        [d for o in outcomes.values() for d in o.different],
    )
    for name, outcome in (outcomes | {"all": whole}).items():
        ended = [kill.ended_after for kill in outcome.kills if kill.alone]
        stages = Counter(kill.stage for kill in outcome.kills)
        rows.append(
            {
                "setting": name,
                "runs": outcome.lives,
                "kills": len(outcome.kills),
                "of one process": len(ended),
                "others ended within": f"{max(ended):.0f} s" if ended else "",
                "hit": ", ".join(f"{stage} {count}" for stage, count in stages.most_common()),
                "equal": "yes" if not outcome.different else "NO",
            }
        )
    return pd.DataFrame(rows)


def main(argv: list[str]) -> None:
    """Run the campaign and print its table; exit with 1 if a resumed run differs from the uninterrupted one."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resume", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="number of kills over all settings")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--only", default="", help="only settings whose name contains this word; all by default")
    parser.add_argument(
        "--keep", type=Path, help="a new folder for the runs, which stays; equal runs are removed from it"
    )
    parser.add_argument(
        "--forked",
        action="store_true",
        help="fork the runs from a process that has imported everything: faster, but without launcher and FSDP2",
    )
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        known = [setting for setting in settings(folder) if setting.launch == "ddp" or not options.forked]
        chosen = [setting for setting in known if options.only in setting.name]
        if not chosen:
            names = "; ".join(setting.name for setting in known)
            parser.error(f"--only is {options.only!r}: expected a part of one of these names: {names}")
        outcomes = campaign(chosen, folder, options.kills, options.seed, forked=options.forked)
    print(table(outcomes).to_string(index=False))
    different = [why for outcome in outcomes.values() for why in outcome.different]
    for why in different:
        print(f"different: {why}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main(sys.argv[1:])
