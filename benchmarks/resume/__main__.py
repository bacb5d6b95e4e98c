"""Kill training runs at random moments of their whole life, resume them, and compare every file with the uninterrupted
run.

python -m benchmarks.resume --kills 100 --seed 0
python -m benchmarks.resume --kills 4 --only viral        # settings whose name has this word
python -m benchmarks.resume --kills 300 --forked          # runs as copies of one process, ten times faster

Each setting is trained once without interruption. Then lives begin: the run is killed by SIGKILL, resumed, killed
again, up to four times, and at last left alone until it ends. Half of the kills come by the clock (one in five of these
in the start-up, the others evenly from the first file to the end), half at the k-th thing that a process does to the
disk, k random: half of those before it happens, half as soon as it is seen. Of two processes sometimes only one is
killed, and the others must end by themselves. `cold` settings begin without features, in a cache of their own. Exit
code 1 when anything differs.
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
    """What became of a setting: its kills, its lives, and what differed at the end of one."""

    lives: int = 0
    kills: list[Kill] = field(default_factory=list)
    different: list[str] = field(default_factory=list)


def settings(folder: Path) -> list[Setting]:
    """Every setting of the campaign; a small model for conversations is built below `folder`."""
    _, flags = world(folder / "world")
    recipe = folder / "recipe.yaml"  # of which the flags say everything
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
    """Kill `kills` times, setting after setting, a life at a time."""
    dice, hooks = random.Random(seed), None if forked else folder / "hooks"
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
        hits, wrong = live(setting, whole[setting.name], place, hooks, dice, min(dice.randint(1, 4), kills - done))
        own = outcomes[setting.name]
        own.lives, own.kills, own.different = own.lives + 1, own.kills + hits, own.different + wrong
        number, done = number + 1, done + len(hits)
        said = (
            ", ".join(h.stage + (f" (one process, {h.ended_after:.0f} s)" if h.alone else "") for h in hits) or "never"
        )
        print(
            f"{done:4} {setting.name}: {said}: {'equal' if not wrong else '; '.join(wrong)}",
            file=sys.stderr,
            flush=True,
        )
        if not wrong:
            shutil.rmtree(place)
    return outcomes


def table(outcomes: dict[str, Outcome]) -> pd.DataFrame:
    """One row for each setting, and their sum."""
    rows = []
    whole = Outcome(
        sum(o.lives for o in outcomes.values()),
        [k for o in outcomes.values() for k in o.kills],
        [d for o in outcomes.values() for d in o.different],
    )
    for name, own in (outcomes | {"all": whole}).items():
        ended = [kill.ended_after for kill in own.kills if kill.alone]
        rows.append(
            {
                "setting": name,
                "runs": own.lives,
                "kills": len(own.kills),
                "of one process": len(ended),
                "others ended within": f"{max(ended):.0f} s" if ended else "",
                "hit": ", ".join(
                    f"{stage} {count}" for stage, count in Counter(kill.stage for kill in own.kills).most_common()
                ),
                "equal": "yes" if not own.different else "NO",
            }
        )
    return pd.DataFrame(rows)


def main(argv: list[str]) -> None:
    """Print the table; exit 1 when a resumed run is not the uninterrupted one."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resume", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="settings whose name has this word; all by default")
    parser.add_argument("--keep", type=Path, help="a new folder for the runs, kept; those that are equal are removed")
    parser.add_argument(
        "--forked",
        action="store_true",
        help="copies of a process that has imported everything: faster, without launcher and FSDP2",
    )
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        known = [setting for setting in settings(folder) if setting.launch == "ddp" or not given.forked]
        chosen = [setting for setting in known if given.only in setting.name]
        if not chosen:
            parser.error(
                f"--only is {given.only!r}: expected a part of one of these names:"
                f" {'; '.join(setting.name for setting in known)}"
            )
        outcomes = campaign(chosen, folder, given.kills, given.seed, forked=given.forked)
    print(table(outcomes).to_string(index=False))
    different = [why for own in outcomes.values() for why in own.different]
    for why in different:
        print(f"different: {why}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main(sys.argv[1:])
