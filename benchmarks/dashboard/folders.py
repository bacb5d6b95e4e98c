"""What a runs folder has stored, read with pandas alone, and folders of very many runs made of one of a few."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

OF_A_TRAINING = ("recipe.yaml", "training.json", "training.parquet", "evaluation.parquet", "accuracy.parquet")
MEAN = "mean of types"


@dataclass(frozen=True)
class Facts:
    """The numbers of the models of a folder that pages must show.

    Attributes:
        answers: {model: its answers, one row per question}.
        accuracies: {model: accuracy, low, high}.
        layers: {model: {layer: every stored score of it, in the words of the page}}.
    """

    answers: Mapping[str, pd.DataFrame]
    accuracies: Mapping[str, list[float]]
    layers: Mapping[str, Mapping[int, set[str]]]

    def only(self, right: str, wrong: str) -> int:
        """Return on how many questions one model is right and the other is not."""
        return int((self.answers[right]["correct"] & ~self.answers[wrong]["correct"]).sum())

    def accuracy(self, model: str) -> float:
        """Return the mean accuracy of question types, from the single answers."""
        return float(self.answers[model].groupby("category")["correct"].mean().mean())

    def questions(self, first: str, second: str) -> Counter[tuple[object, ...]]:
        """Return how often each row of Examples occurs: question, answer, both answers, both probabilities."""
        a, b = self.answers[first], self.answers[second]
        columns = [a["question"], a["answer"], a["given"], b["given"], a["p_right"], b["p_right"]]
        return Counter(zip(*columns, strict=True))


def facts(root: Path) -> Facts:
    """Read the trainings and the scores by layer of a runs folder."""
    models = [file.parent.name for file in root.glob("*/training.json")]
    answers = {name: pd.read_parquet(root / name / "evaluation.parquet").sort_values("id") for name in models}
    answers = {name: table.reset_index(drop=True) for name, table in answers.items()}
    accuracies = {}
    for name in models:
        table = pd.read_parquet(root / name / "accuracy.parquet").set_index("category")
        accuracies[name] = table.loc[MEAN, ["accuracy", "low", "high"]].tolist()
    layers: dict[str, dict[int, set[str]]] = {name: {} for name in models}
    for file in root.glob("*/run.json"):
        record = json.loads(file.read_text())
        for table in (pd.read_parquet(path) for path in file.parent.glob("*.parquet")):
            for row in _by_layer(table).itertuples():
                words = f"{row.score:.3f} [{row.low:.3f}, {row.high:.3f}]"
                layers.get(record["label"], {}).setdefault(int(row.layer), set()).add(words)
    return Facts(answers, accuracies, layers)


def _by_layer(table: pd.DataFrame) -> pd.DataFrame:
    """Return the columns layer, score, low, high of a table that has them under these or an intervention's names."""
    table = table.rename(columns={"accuracy_drop": "score", "first": "layer"})
    if "site" in table:
        table = table.assign(layer=pd.to_numeric(table["site"], errors="coerce"))
    if not {"layer", "score", "low", "high"} <= set(table.columns):
        return pd.DataFrame({"layer": [], "score": [], "low": [], "high": []})
    return table[["layer", "score", "low", "high"]].dropna()


def enlarge(source: Path, target: Path, *, seeds: int, runs: int, checkpoints: int) -> None:
    """Copy the trainings and analyses of a folder under other seeds, without weights.

    Args:
        seeds: number of trainings of each variant.
        runs: number of stored analyses in all.
        checkpoints: number of checkpoints of each training, which are empty.
    """
    names = sorted(file.parent.name for file in source.glob("*/training.json"))
    records = {file.parent: json.loads(file.read_text()) for file in sorted(source.glob("*/run.json"))}
    stored = 0
    for seed in range(seeds):
        for name in names:
            folder = target / f"{name}-s{seed}"
            folder.mkdir(parents=True)
            for file in OF_A_TRAINING:
                shutil.copy(source / name / file, folder / file)
            recipe = yaml.safe_load((source / name / "recipe.yaml").read_text()) | {"seed": seed}
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            record = json.loads((folder / "training.json").read_text())
            (folder / "training.json").write_text(json.dumps(record | {"recipe": record["recipe"] | {"seed": seed}}))
            for step in range(1, checkpoints + 1):
                (folder / f"checkpoint-{step}").mkdir()
                (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    while stored < runs:
        for folder, record in records.items():
            seed = stored // len(records)
            if stored == runs:
                break
            label = f"{record['label']}-s{seed % seeds}"
            key = f"{stored:012x}"
            copy = target / f"{record['analysis']}-{key}"
            shutil.copytree(folder, copy)
            config = record["config"] | ({} if seed < seeds else {"seed": seed})
            changed = {"label": label, "model": label, "key": key, "config": config}
            (copy / "run.json").write_text(json.dumps(record | changed))
            stored += 1
