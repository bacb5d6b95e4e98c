"""The model card of a training folder, and the upload of the folder to the hub.

python -m trainer.card runs/viral                              # write the card (README.md) again
python -m trainer.card runs/viral --push_to_hub NAME/MODEL     # and upload the model; a new repository is private

The card contains no path of this machine: a data set or a model in a folder appears under the folder's last name only.
Uploaded are the model, its processor, the alignment heads, the scores and the card. Recipe, record and logs are not
uploaded, because they contain paths and the command line.
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
    """Write the card of the training in `folder`; training.json need not exist yet, `record` is its future content."""
    evaluation = evaluation_of(folder)
    with atomic_file(folder / CARD_FILE) as partial:
        partial.write_text(card(record, evaluation, cknna_log(folder)), encoding="utf-8")


def card(record: Mapping[str, Any], evaluation: pd.DataFrame, cknna: pd.DataFrame) -> str:
    """Return the text of the card, Markdown after a YAML header.

    Args:
        record: the content of training.json.
        evaluation: the content of evaluation.parquet: one row per question or per conversation.
        cknna: the table that `cknna_log` returns.
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
        warnings = "\n".join(f"- {_without_folders(sentence)}" for sentence in record["warnings"])
        parts += ["Warnings of the training:", warnings]
    return f"---\n{_metadata(recipe, made_from)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _without_folders(value: str) -> str:
    """Return a text with every path in it cut to its last part; hub ids stay whole."""
    return " ".join(_last_part(word) for word in value.split(" "))


def _last_part(word: str) -> str:
    """Cut the paths in one word, which may be a data spec such as llava_json:FILE?images=FOLDER&split=val."""
    if word.startswith("https:"):
        return word
    pieces = re.split(r"([:?&=])", word)
    for n, piece in enumerate(pieces):
        named = pieces[n - 2 : n] in (["hf", ":"], ["timm", ":"], ["hub", ":"]) or any(
            entry.hub == piece for entry in map(WEIGHTS.get, WEIGHTS)
        )
        if "/" in piece and not (named and re.fullmatch(HUB_ID, piece) and not Path(piece).exists()):
            pieces[n] = Path(piece).name
    return "".join(pieces)


def origins(recipe: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the weights that a model was built from, one row for each part.

    A part that was itself trained by this workbench is followed by the parts that it was built from. The function looks
    into the folders that the recipe names, so it is called when the training ends, and training.json stores its result.

    Returns:
        Rows with the keys part, weights (a name, or the last part of a folder's path), hub (hub id or ""), from and
        licence.
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
            ancestors = record.get("origins") or origins(record["recipe"])
            rows += [ancestor | {"part": f"{ancestor['part']} of {folder.name}"} for ancestor in ancestors]
    return rows


def _parts(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Return the pretrained weights that a recipe names, as {part: name}."""
    model = recipe["model"]
    if model.get("name"):
        return {"model": model["name"]}
    parts = {"vision encoder": model["vision_encoder"], "language model": model.get("language")}
    return {part: name for part, name in parts.items() if name}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _metadata(recipe: Mapping[str, Any], made_from: Sequence[Mapping[str, str]]) -> str:
    """Return the YAML header, which the hub reads."""
    base = list(dict.fromkeys(origin["hub"] for origin in made_from if origin["hub"]))
    tags = ["viral-workbench"]
    if recipe["alignment"]["objective"] != "none":
        tags.append("visual-representation-alignment")
    # plain transformers cannot run a model with a second encoder
    library = None if recipe["model"].get("second_encoder") else "transformers"
    return ModelCardData(
        library_name=library, pipeline_tag="image-text-to-text", tags=tags, base_model=base or None
    ).to_yaml()


def _intent(recipe: Mapping[str, Any]) -> str:
    """Return what kind of model this is: VIRAL, a control of it, or a baseline."""
    if recipe["alignment"]["objective"] == "none":
        kind = "trained without alignment"
    elif recipe["alignment"].get("images", "same") == "others":
        kind = (
            "trained as a control of VIRAL (arXiv 2509.07979): the visual tokens of an image were aligned with the"
            " features of another image"
        )
    elif recipe["alignment"]["objective"] == "predict":
        kind = "trained to predict features of the image from its visual tokens (not the objective of VIRAL)"
    else:
        kind = "whose visual tokens were aligned with other features during training (VIRAL, arXiv 2509.07979)"
    return f"A multimodal language model {kind}. A research model: nothing is known about it but the scores below."


def _sources(
    recipe: Mapping[str, Any], record: Mapping[str, Any], made_from: Sequence[Mapping[str, str]]
) -> pd.DataFrame:
    """Return everything that the model was built from, with fingerprint and licence."""
    model, settings = recipe["model"], recipe["alignment"]
    if model["kind"] == "toy":
        prints = {
            "vision encoder": record.get("tower_fingerprint"),
            "language model": record.get("language_fingerprint"),
        }
    else:  # one fingerprint for the whole model, before it was trained
        prints = dict.fromkeys(("model", "vision encoder", "language model"), record.get("model_fingerprint"))
    rows = [
        (row["part"], row["weights"], row["from"], prints.get(row["part"]) or "", row["licence"]) for row in made_from
    ]
    if settings["objective"] != "none" and settings.get("target", "vfm") == "vfm":
        targets = dict(zip(_list(record.get("vfm", [])), _list(record.get("vfm_fingerprint", [])), strict=True))
        for name in _list(settings["vfm"]):
            rows.append(_vfm_row("alignment target", name, targets.get(name, "")))
    if model.get("second_encoder"):
        rows.append(_vfm_row("second encoder", model["second_encoder"], record.get("second_encoder_fingerprint", "")))
    if not model.get("language") and not model.get("name"):
        rows.append(("language model", "randomly initialized", "", "", ""))
    if recipe["start"]:
        start, fingerprint = _without_folders(recipe["start"]), record.get("start_fingerprint", "")
        rows.append(("start", start, "a training of this workbench", fingerprint, ""))
    return pd.DataFrame(rows, columns=["part", "weights", "from", "fingerprint", "licence"])


def _vfm_row(part: str, name: str, fingerprint: str) -> tuple[str, str, str, str, str]:
    weights = find_vfm(name).weights
    entry, shown = WEIGHTS.get(weights), _without_folders(weights)
    return f"{part} {_without_folders(name)}", shown, entry.hub or "a folder", fingerprint, entry.licence


def _objective(recipe: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Return the loss, what was aligned with what, the length of the training, and its seed."""
    alignment, optim = recipe["alignment"], recipe["optim"]
    aligned = alignment["objective"] != "none"
    loss = "`L_LM`, the next-token loss on the answers"
    if aligned:
        constant = alignment.get("schedule", "constant") == "constant" and not alignment.get("warmup")
        factor = alignment["weight"] if constant else "lambda(step)"
        loss = f"`L = L_LM + {factor} * L_VRA`, {alignment['objective']} objective"
    vfms = [_without_folders(name) for name in _list(alignment["vfm"])]
    words = alignment_words({**alignment, "layer": _list(alignment["layer"]), "vfm": vfms})
    if words != "none":
        loss += f"; aligned: {words}" if aligned else f"; not aligned: {words}"
    batch = record.get("global_batch", optim["batch_size"] * optim["accumulation"])
    unit = "conversations" if "trained" in record else "images"
    return (
        f"{loss}. {optim['steps']} steps of {batch} {unit}, seed {recipe['seed']}; trained:"
        f" {recipe['model'].get('train', 'all')}."
    )


def _data(recipe: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Return the table of the data sets with their fingerprints."""
    rows = [
        ("training", " + ".join(map(_without_folders, _list(recipe["data"]["train"]))), record["data"]),
        ("validation", _without_folders(recipe["data"]["val"]), record.get("val", "")),
    ]
    if (test := recipe["data"].get("test")) is not None:
        rows.append(("test", _without_folders(test), record.get("test", "")))
    return _table(pd.DataFrame(rows, columns=["split", "data", "fingerprint"]))


def _scores(recipe: Mapping[str, Any], evaluation: pd.DataFrame, cknna: pd.DataFrame) -> str:
    """Return the table of accuracies (or the loss) and the last CKNNA, and how they were measured."""
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
    for accuracy in accuracy_by_type(evaluation, seed=recipe["seed"]) if "correct" in evaluation else ():
        named = {
            "score": f"accuracy, {accuracy['category']}",
            "value": accuracy["accuracy"],
            "95 % interval": f"{accuracy['low']:.3f} to {accuracy['high']:.3f}",
        }
        few = ", too few to say much" if accuracy["few"] else ""
        n = f"{accuracy['n']} questions, {accuracy['n_images']} images{few}"
        rows.append(named | {"chance": f"{accuracy['chance']:.3f}", "n": n})
    for row in cknna[cknna["step"] == recipe["optim"]["steps"]].itertuples():
        named = {
            "score": f"CKNNA, {_without_folders(row.of)}, k = {row.k:.0f}",
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
    how = "Measured on the validation split, which was also evaluated during training. "
    if recipe["data"].get("test") is not None:
        how = "Measured on the test split, once, after training (CKNNA: on the validation split). "
    how += (
        "Intervals are over the images (for a loss: the conversations) of this one model; they say nothing about other"
        " seeds."
    )
    return f"{_table(pd.DataFrame(rows))}\n\n{how} Seed {recipe['seed']}."


def _loading(recipe: Mapping[str, Any]) -> str:
    """Return how to load the model: with plain transformers, with `MLLM.load`, or only in the trainer."""
    settings = recipe["alignment"]
    if second := recipe["model"].get("second_encoder"):
        return (
            f"This model sees {_without_folders(second)} beside its own vision encoder, and its projector takes the"
            " features of both: neither plain transformers nor `MLLM.load` can run it, only the trainer can (`start`,"
            " `--resume`). Its accuracies are those above and in `accuracy.parquet`."
        )
    if settings.get("residual", "none") != "none":
        return (
            "This model adds its image features again inside the language model. Plain `from_pretrained` ignores that"
            " and computes **another model**; load it with\n\n```python\nfrom workbench import MLLM\n\nmllm ="
            " MLLM.load(FOLDER_OR_NAME)\n```"
        )
    return (
        "```python\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n\nmodel ="
        " AutoModelForImageTextToText.from_pretrained(FOLDER_OR_NAME)\nprocessor ="
        f" AutoProcessor.from_pretrained(FOLDER_OR_NAME)\n```\n\nNo other code is needed. `{HEAD_FILE}`, if present,"
        " was used during training only."
    )


def _recipe(recipe: Mapping[str, Any], made_from: Sequence[Mapping[str, str]]) -> str:
    """Return the recipe as YAML, without paths of this machine."""
    of_this_machine = ("output_dir", "resume", "report_to", "push_to_hub")
    shown = {key: value for key, value in recipe.items() if key not in of_this_machine}
    if recipe["model"].get("name"):  # the other keys of `model` describe a toy LLaVA
        keys_of_any_model = ("kind", "name", "revision", "train", "lora", "train_vision_encoder")
        shown["model"] = {key: recipe["model"][key] for key in keys_of_any_model}
    shown = _without_paths(shown)
    keys = {"model": "name", "vision encoder": "vision_encoder", "language model": "language"}
    # a hub id looks like a path, so it was cut to its last part: write it whole again
    shown["model"] |= {keys[origin["part"]]: origin["weights"] for origin in made_from if origin["part"] in keys}
    return f"```yaml\n{yaml.safe_dump(shown, sort_keys=False)}```"


def _without_paths(value: Any) -> Any:
    """Apply `_named` to every text in a nested value."""
    if isinstance(value, Mapping):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    return _without_folders(value) if isinstance(value, str) else value


def _versions(record: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {record['packages'][name]}" for name in ("torch", "transformers") if name in record["packages"]
    )


def _table(table: pd.DataFrame) -> str:
    """Return a table in Markdown."""
    rows = [
        [f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|") for value in row]
        for row in table.itertuples(index=False)
    ]
    rows = [list(table.columns), ["---"] * len(table.columns), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


@dataclass(frozen=True)
class Card:
    """Write the card of a finished training folder."""

    push_to_hub: str | None = None
    """Repository on the hub to upload the model to, such as NAME/MODEL; by default nothing is uploaded."""


def main(argv: list[str]) -> None:
    """Write the card, and upload the model if `--push_to_hub` asks for it."""
    if not argv or argv[0].startswith("-"):
        if "--help" not in argv and "-h" not in argv:
            raise ConfigError(
                "no training folder is named: expected python -m trainer.card FOLDER [--push_to_hub NAME/MODEL]"
            )
        argv = ["", *argv]
    folder = Path(argv[0])
    repository = parse(Card, argv[1:], prog="python -m trainer.card FOLDER", description=__doc__ or "").push_to_hub
    if repository is not None:
        check_hub(repository)
    write_card(folder, training_record(folder))
    sys.stdout.write(f"{folder / CARD_FILE if repository is None else push(folder, repository)}\n")


if __name__ == "__main__":
    command(main)
