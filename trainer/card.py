"""The model card of a training folder, and sending the folder to the hub.

python -m trainer.card runs/viral                                  # writes the card anew, README.md
python -m trainer.card runs/viral --push_to_hub NAME/MODEL         # and sends the model with it; a new repository is
                                                                   private

The card holds what a reader needs and no path of the machine: of a data set or a model in a folder it has the folder's
own name. What is sent is the model, its processor, the heads, the scores and the card; recipe, record and logs stay
here, since they name folders and the command.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from huggingface_hub import ModelCardData

from trainer.evaluation import summary
from trainer.hub import CARD_FILE, HUB_ID, check_hub, push
from workbench.cli import command, parse
from workbench.errors import ConfigError
from workbench.files import HEAD_FILE, atomic_file
from workbench.scoring.tables import accuracy_by_type
from workbench.training_folder import RECORD_FILE, alignment_words, cknna_log, evaluation_of, training_record
from workbench.vfm import find_vfm
from workbench.weights.catalogue import CATALOGUE as WEIGHTS


def write_card(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the card of the training in `folder`, whose record may not be there yet."""
    evaluation = evaluation_of(folder)
    with atomic_file(folder / CARD_FILE) as partial:
        partial.write_text(card(record, evaluation, cknna_log(folder)), encoding="utf-8")


def card(record: Mapping[str, Any], evaluation: pd.DataFrame, cknna: pd.DataFrame) -> str:
    """The text of the card.

    Args:
        record: what training.json holds.
        evaluation: the answers, one row per question, as evaluation.parquet.
        cknna: as `cknna_log` gives it.
    """
    recipe = record["recipe"]
    name = Path(recipe["output_dir"]).name
    made_from = record.get("origins") or origins(recipe)
    parts = [
        f"# {name}",
        _intent(recipe),
        "## Built from",
        _table(_sources(recipe, record, made_from)),
        "## Objective",
        _objective(recipe, record),
        "## Data",
        _data(recipe, record),
    ]
    parts += [
        "## Scores",
        _scores(recipe, evaluation, cknna),
        "## How to load",
        _loading(recipe),
        "## Recipe",
        _recipe(recipe, made_from),
    ]
    parts += [
        f"Trained with VIRAL Workbench {record['packages']['viral-workbench']}, {_versions(record)},"
        f" {record['created'][:10]}."
    ]
    if record.get("warnings"):
        parts += ["Warnings of the training:", "\n".join(f"- {_named(sentence)}" for sentence in record["warnings"])]
    return f"---\n{_metadata(recipe, made_from)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _named(value: str) -> str:
    """A value without the folders above what it names: the last part of every path in it."""
    return " ".join(_last_part(word) for word in value.split(" "))


def _last_part(word: str) -> str:
    if word.startswith("https:"):
        return word
    pieces = re.split(r"([:?&=])", word)  # such as llava_json:FILE?images=FOLDER&split=val
    for n, piece in enumerate(pieces):
        named = pieces[n - 2 : n] in (["hf", ":"], ["timm", ":"], ["hub", ":"]) or any(
            entry.hub == piece for entry in map(WEIGHTS.get, WEIGHTS)
        )
        if "/" in piece and not (named and re.fullmatch(HUB_ID, piece) and not Path(piece).exists()):
            pieces[n] = Path(piece).name
    return "".join(pieces)


def origins(recipe: Mapping[str, Any]) -> list[dict[str, str]]:
    """What a model was made from, and what that was made from where it was trained here: part, weights (a folder's own
    name), hub (id or ""), from, licence.

    Folders are looked at, so a training asks while they are there; its record keeps the answer.
    """
    rows = []
    for part, name in _parts(recipe).items():
        row, folder = {"part": part, "weights": name, "hub": ""}, Path(name)
        if name in WEIGHTS:
            entry = WEIGHTS.get(name)
            rows.append(row | {"hub": entry.hub, "from": entry.hub or "a folder", "licence": entry.licence})
        elif not folder.is_dir() and re.fullmatch(HUB_ID, name):
            known = (entry.licence for entry in map(WEIGHTS.get, WEIGHTS) if entry.hub == name)
            rows.append(row | {"hub": name, "from": "the hub", "licence": next(known, "see its page on the hub")})
        elif not (folder / RECORD_FILE).exists():
            rows.append(row | {"weights": folder.name, "from": "a folder", "licence": "its own"})
        else:
            record = training_record(folder)
            rows.append(
                row | {"weights": folder.name, "from": "a training of this workbench", "licence": "that of its parts"}
            )
            rows += [
                own | {"part": f"{own['part']} of {folder.name}"}
                for own in record.get("origins") or origins(record["recipe"])
            ]
    return rows


def _parts(recipe: Mapping[str, Any]) -> dict[str, str]:
    """{part: name} of what the model was made from."""
    model = recipe["model"]
    named = (
        {"model": model.get("name")}
        if model.get("name")
        else {"vision encoder": model["vision_encoder"], "language model": model.get("language")}
    )
    return {part: name for part, name in named.items() if name}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _metadata(recipe: Mapping[str, Any], made_from: Sequence[Mapping[str, str]]) -> str:
    base = list(dict.fromkeys(own["hub"] for own in made_from if own["hub"]))
    tags = [
        "viral-workbench",
        *(["visual-representation-alignment"] if recipe["alignment"]["objective"] != "none" else []),
    ]
    library = None if recipe["model"].get("second_encoder") else "transformers"  # which cannot run it
    return ModelCardData(
        library_name=library, pipeline_tag="image-text-to-text", tags=tags, base_model=base or None
    ).to_yaml()


def _intent(recipe: Mapping[str, Any]) -> str:
    aligned = recipe["alignment"]["objective"] != "none"
    kind = (
        "whose visual tokens were aligned with other features while it was trained (VIRAL, arXiv 2509.07979)"
        if aligned
        else "trained without alignment"
    )
    if aligned and recipe["alignment"].get("images", "same") == "others":
        kind = (
            "trained as a control of VIRAL (arXiv 2509.07979): its visual tokens were aligned with features of other"
            " images than its own"
        )
    return f"A multimodal language model {kind}. A research model: nothing is known of it but the scores below."


def _sources(
    recipe: Mapping[str, Any], record: Mapping[str, Any], made_from: Sequence[Mapping[str, str]]
) -> pd.DataFrame:
    own, settings = recipe["model"], recipe["alignment"]
    prints = {"vision encoder": record.get("tower_fingerprint"), "language model": record.get("language_fingerprint")}
    if own["kind"] != "toy":  # of the model as a whole, before it was trained
        prints = dict.fromkeys(("model", "vision encoder", "language model"), record.get("model_fingerprint"))
    rows = [
        (row["part"], row["weights"], row["from"], prints.get(row["part"]) or "", row["licence"]) for row in made_from
    ]
    if settings["objective"] != "none" and settings.get("target", "vfm") == "vfm":
        targets = dict(zip(_list(record.get("vfm", [])), _list(record.get("vfm_fingerprint", [])), strict=True))
        for name in _list(settings["vfm"]):
            rows.append(_vfm_row("alignment target", name, targets.get(name, "")))
    if own.get("second_encoder"):
        rows.append(_vfm_row("second encoder", own["second_encoder"], record.get("second_encoder_fingerprint", "")))
    if not own.get("language") and not own.get("name"):
        rows.append(("language model", "trained from nothing", "", "", ""))
    if recipe["start"]:
        rows.append(
            ("start", _named(recipe["start"]), "a training of this workbench", record.get("start_fingerprint", ""), "")
        )
    return pd.DataFrame(rows, columns=["part", "weights", "from", "fingerprint", "licence"])


def _vfm_row(part: str, name: str, fingerprint: str) -> tuple[str, str, str, str, str]:
    weights = find_vfm(name).weights
    entry = WEIGHTS.get(weights)
    return f"{part} {_named(name)}", _named(weights), entry.hub or "a folder", fingerprint, entry.licence


def _objective(recipe: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    own, optim = recipe["alignment"], recipe["optim"]
    said = "`L_LM`, the next-token loss on the answers"
    if own["objective"] != "none":
        factor = (
            own["weight"] if own.get("schedule", "constant") == "constant" and not own.get("warmup") else "lambda(step)"
        )
        said = f"`L = L_LM + {factor} * L_VRA`, {own['objective']} objective"
    if (
        words := alignment_words(
            {**own, "layer": _list(own["layer"]), "vfm": [_named(name) for name in _list(own["vfm"])]}
        )
    ) != "none":
        said += f"; aligned: {words}" if own["objective"] != "none" else f"; not aligned: {words}"
    batch = record.get("global_batch", optim["batch_size"] * optim["accumulation"])
    unit = "conversations" if "trained" in record else "images"
    return (
        f"{said}. {optim['steps']} steps of {batch} {unit}, seed {recipe['seed']}; trained:"
        f" {recipe['model'].get('train', 'all')}."
    )


def _data(recipe: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    rows = [
        ("training", " + ".join(map(_named, _list(recipe["data"]["train"]))), record["data"]),
        ("validation", _named(recipe["data"]["val"]), record.get("val", "")),
    ]
    if (test := recipe["data"].get("test")) is not None:
        rows.append(("test", _named(test), record.get("test", "")))
    return _table(pd.DataFrame(rows, columns=["split", "data", "fingerprint"]))


def _scores(recipe: Mapping[str, Any], evaluation: pd.DataFrame, cknna: pd.DataFrame) -> str:
    rows: list[dict[str, Any]] = []
    if "correct" not in evaluation:
        (loss,) = summary(evaluation, recipe["seed"]).to_dict("records")
        named = {
            "score": "loss per answer token, nats",
            "value": loss["lm_loss"],
            "95 % interval": f"{loss['low']:.3f} to {loss['high']:.3f}",
        }
        rows.append(
            named
            | {
                "chance": f"{loss['chance']:.3f}",
                "n": f"{loss['n']} tokens, {loss['n_conversations']} conversations",
            }
        )
    for own in accuracy_by_type(evaluation, seed=recipe["seed"]) if "correct" in evaluation else ():
        named = {
            "score": f"accuracy, {own['category']}",
            "value": own["accuracy"],
            "95 % interval": f"{own['low']:.3f} to {own['high']:.3f}",
        }
        few = ", too few to say much" if own["few"] else ""
        rows.append(
            named | {"chance": f"{own['chance']:.3f}", "n": f"{own['n']} questions, {own['n_images']} images{few}"}
        )
    for row in cknna[cknna["step"] == recipe["optim"]["steps"]].itertuples():
        named = {
            "score": f"CKNNA, {_named(row.of)}, k = {row.k:.0f}",
            "value": row.score,
            "95 % interval": f"{row.low:.3f} to {row.high:.3f}",
        }
        rows.append(
            named
            | {
                "chance": f"{row.null_mean:.3f} (95 % below {row.null_q95:.3f})",
                "n": f"{row.n:.0f} tokens, {row.n_images:.0f} images",
            }
        )
    how = "On the validation split, which was looked at while training. "
    if recipe["data"].get("test") is not None:
        how = "On the test split, which was looked at once, after training (CKNNA: on the validation split). "
    how += (
        "Intervals are over images (of a loss: over conversations), of this one model: they say nothing about other"
        " seeds."
    )
    return f"{_table(pd.DataFrame(rows))}\n\n{how} Seed {recipe['seed']}."


def _loading(recipe: Mapping[str, Any]) -> str:
    settings = recipe["alignment"]
    if second := recipe["model"].get("second_encoder"):
        return (
            f"This model sees {_named(second)} beside its own vision encoder, and its connector is as wide as both:"
            " neither plain transformers nor `MLLM.load` can run it, the trainer alone can (`start`, `--resume`). Its"
            " accuracies are those above and in `accuracy.parquet`."
        )
    if settings.get("residual", "none") != "none":
        return (
            "This model adds its image again inside the language model. Plain `from_pretrained` ignores that and"
            " computes **another model**; load it with\n\n```python\nfrom workbench import MLLM\n\nmllm ="
            " MLLM.load(FOLDER_OR_NAME)\n```"
        )
    return (
        "```python\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n\nmodel ="
        " AutoModelForImageTextToText.from_pretrained(FOLDER_OR_NAME)\nprocessor ="
        f" AutoProcessor.from_pretrained(FOLDER_OR_NAME)\n```\n\nNo other code is needed. `{HEAD_FILE}`, where there is"
        " one, was used in training only."
    )


def _recipe(recipe: Mapping[str, Any], made_from: Sequence[Mapping[str, str]]) -> str:
    kept = {
        key: value for key, value in recipe.items() if key not in ("output_dir", "resume", "report_to", "push_to_hub")
    }
    if recipe["model"].get("name"):  # which brings its own; the other keys describe a toy LLaVA
        kept["model"] = {key: recipe["model"][key] for key in ("kind", "name", "train", "lora", "train_vision_encoder")}
    said = _without_paths(kept)
    keys = {"model": "name", "vision encoder": "vision_encoder", "language model": "language"}
    # hub ids whole, which look like paths
    said["model"] |= {keys[own["part"]]: own["weights"] for own in made_from if own["part"] in keys}
    return f"```yaml\n{yaml.safe_dump(said, sort_keys=False)}```"


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    return _named(value) if isinstance(value, str) else value


def _versions(record: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {record['packages'][name]}" for name in ("torch", "transformers") if name in record["packages"]
    )


def _table(table: pd.DataFrame) -> str:
    """A table in Markdown."""
    cells = [
        [f"{cell:.3f}" if isinstance(cell, float) else str(cell).replace("|", "\\|") for cell in row]
        for row in table.itertuples(index=False)
    ]
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [list(table.columns), ["---"] * len(table.columns), *cells]
    )


@dataclass(frozen=True)
class Card:
    """Write the card of a finished training folder."""

    push_to_hub: str | None = None
    """Where the model goes on the hub, such as NAME/MODEL."""


def main(argv: list[str]) -> None:
    """Write the card, and send the model if asked."""
    if not argv or argv[0].startswith("-"):
        if "--help" not in argv and "-h" not in argv:
            raise ConfigError("no folder given: expected python -m trainer.card FOLDER [--push_to_hub NAME]")
        argv = ["", *argv]
    folder = Path(argv[0])
    options = parse(Card, argv[1:], prog="python -m trainer.card FOLDER", description=__doc__ or "")
    if options.push_to_hub is not None:
        check_hub(options.push_to_hub)
    write_card(folder, training_record(folder))
    sys.stdout.write(
        f"{push(folder, options.push_to_hub) if options.push_to_hub is not None else folder / CARD_FILE}\n"
    )


if __name__ == "__main__":
    command(main)
