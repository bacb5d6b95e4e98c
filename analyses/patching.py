"""Put the visual tokens of one model into another at the same layer, and score the answers again.

    python -m analyses.patching --model runs/baseline runs/viral --source runs/viral --data shapes:val --limit 200

The visual tokens of `--source` at layer l replace those of each model at layer l. The number is the accuracy drop:
accuracy before minus accuracy after, on the same questions, with an interval over images. Beside it is
KL(before || after) of the answer over the question's options, in nats.

What the number is not: a measure of how much the source's tokens hold. Two models trained separately need not agree on
what a direction in their tokens means; models that share stage 1 agree most. The control `self` puts a model's own
tokens back, read in another forward pass: it must change nothing, and so must a model that is patched with itself. The
source therefore runs with the data type and the quantization of the model that gets its tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from workbench import figures as fig
from workbench.analysis.chunks import Chunk, Part, joined
from workbench.analysis.command import main
from workbench.analysis.declaration import Analysis, Context, Result
from workbench.benchmarks.asking import QuestionOptions, ask
from workbench.capture.edit import check_site
from workbench.capture.hidden_states import Activations, check_layers, read
from workbench.data.base import Sample
from workbench.errors import ConfigError, DataError, ModelError
from workbench.files import state_of
from workbench.mllm import MLLM
from workbench.models import check_revision, is_folder, label_of, split_name
from workbench.runs import Run
from workbench.scoring.quiz import Quiz
from workbench.scoring.tables import change_by_type, changes, drops
from workbench.training_folder import MEAN

log = logging.getLogger(__name__)

PATCHED, SELF = "patched", "self"


@dataclass(frozen=True)
class Config(QuestionOptions):
    """Whose tokens are put in, where, and which questions are asked."""

    source: str = ""
    """Model whose visual tokens are put into the others: a folder or hub id, or NAME=FOLDER."""
    source_revision: str | None = None
    """Branch, tag or commit of the source, if it is a hub id."""
    layers: tuple[int, ...] = ()
    """Layers at which tokens are put in, 0 to L; by default all that both models have."""


def _load(source: str, revision: str | None) -> MLLM:
    if not source:
        raise ConfigError("no source given: name the model whose tokens are put in with --source FOLDER_OR_HUB_ID")
    name = split_name(source)[1]
    check_revision({source: name}, revision)
    files = sorted(file for file in Path(name).iterdir() if file.exists()) if is_folder(name) else []
    return _loaded(name, revision, tuple((file.name, *state_of(file.stat())) for file in files))


@lru_cache(maxsize=1)
def _loaded(name: str, revision: str | None, files: object) -> MLLM:
    """Load the source; it is kept for as long as the `files` of its folder do not change."""
    return MLLM.load(name, revision=revision)


def run(config: Config, context: Context) -> Result:
    """Ask every question before and after the tokens are replaced, at each layer."""
    target, source = context.mllm, _load(config.source, config.source_revision)
    labels = label_of(config.source), context.label or label_of(target.name)
    if (source.model.dtype, source.load_in) != (target.model.dtype, target.load_in):
        source = target.load_alike(source.name, revision=config.source_revision)
    elif source.load_in is None:  # a quantized model cannot be moved
        source.model.to(target.device)
    asking = ask(config, target, context.data, types=config.types, each=config.questions)
    scenes = asking.worded
    check_pair(target, source)
    for mllm in (target, source):
        _check_prefix(mllm, scenes[0][0])
    layers, skipped = _layers(target, source, config)
    parts = context.map("patched questions", scenes, partial(_ask_chunk, target, source, layers, labels))
    samples = joined(parts, "samples")
    record = {"source_fingerprint": source.fingerprint, "skipped": skipped}
    record |= asking.record
    return Result({"scores": _scores(samples, labels[0], config), "samples": samples}, {}, record, asking.left_out)


def _ask_chunk(
    target: MLLM, source: MLLM, layers: list[int], labels: tuple[str, str], chunk: Chunk[list[Sample]]
) -> Part:
    """Ask the questions of a chunk before and after the source's tokens, or the target's own, are put in at each layer.

    Args:
        labels: of the source and of the target, for messages.
    """
    tables = []
    for _, scenes in chunk.batches():
        quiz = Quiz(target, scenes, chunk.batch_size)
        before = quiz.logprobs()
        for kind, mllm in ((PATCHED, source), (SELF, target)):
            batch = mllm.encode([scene[0].image for scene in scenes], [scene[0].question for scene in scenes])
            tokens = read(mllm, batch, layers=layers)
            for number, layer in enumerate(layers):
                after = quiz.logprobs(layer, partial(_replace, tokens=tokens, number=number, labels=labels))
                tables.append(quiz.scored(before, after).assign(site=str(layer), layer=layer, kind=kind))
    return Part({"samples": pd.concat(tables, ignore_index=True)})


def check_pair(target: MLLM, source: MLLM) -> None:
    """Raise a ConfigError unless tokens of the source fit into the target and both have the same tokenizer."""
    widths = [mllm.config.get_text_config().hidden_size for mllm in (source, target)]
    if widths[0] != widths[1]:
        raise ConfigError(
            f"{source.name} has visual tokens of width {widths[0]}, {target.name} of width {widths[1]}: choose a source"
            " of the same width"
        )
    if source.processor.tokenizer.get_vocab() != target.processor.tokenizer.get_vocab():
        raise ConfigError(
            f"{source.name} and {target.name} have different tokenizers: choose a source with the same one, so that"
            " both are asked the same"
        )


def _check_prefix(mllm: MLLM, sample: Sample) -> None:
    """Raise a ModelError if the visual tokens depend on the question, since then an image has no single set of them."""
    batch = mllm.encode([sample.image] * 2, [sample.question, f"{sample.question} {sample.question}"])
    first, second = (activations.values for activations in read(mllm, batch))
    if not torch.allclose(first, second, rtol=1e-2, atol=1e-2 * float(first.abs().max())):
        raise ModelError(
            f"the visual tokens of {mllm.name} depend on the question that follows: choose a model that reads the image"
            " first"
        )


def _layers(target: MLLM, source: MLLM, config: Config) -> tuple[list[int], dict[str, str]]:
    """Return the layers that both models have and that can be changed in both, and why the others cannot.

    Raises:
        ModelError: no layer is left.
    """
    shared = [layer for layer in check_layers(target, None) if layer <= source.n_layers]
    wanted = check_layers(source, check_layers(target, config.layers)) if config.layers else shared
    layers, skipped = [], {}
    for layer in wanted:
        try:
            for mllm in (target, source):
                check_site(mllm, layer)
            layers.append(layer)
        except ModelError as error:
            skipped[f"site {layer}"] = str(error)
            log.warning("%s: layer %s is left out: %s", target.name, layer, error)
    if not layers:
        raise ModelError(f"{target.name}: visual tokens can be replaced at no layer ({next(iter(skipped.values()))})")
    return layers, skipped


def _replace(
    values: Float[Tensor, "token d"], image: int, *, tokens: list[Activations], number: int, labels: tuple[str, str]
) -> Float[Tensor, "token d"]:
    """Return the tokens of the other forward pass in place of `values`; `number` counts the layers that were read.

    Raises:
        DataError: another number of tokens.
    """
    new = tokens[image].values[number]
    if new.shape != values.shape:
        raise DataError(
            f"{labels[0]} has {len(new)} visual tokens where {labels[1]} has {len(values)}: choose a source with the"
            " same number for every image"
        )
    return new


def _scores(samples: pd.DataFrame, source: str, config: Config) -> pd.DataFrame:
    """Return one row for each layer, kind and question type."""
    rows = []
    for (layer, kind), answers in samples.groupby(["layer", "kind"], sort=False):
        named: dict[str, Any] = {"site": str(layer), "layer": layer, "kind": kind, "source": source}
        rows += [named | row for row in change_by_type(answers, seed=config.seed)]
    return pd.DataFrame(rows)


def summary(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return one row for each model, layer and kind: the mean of question types."""
    table = changes(runs)
    return table[table["category"] == MEAN].drop(columns=["layer", "seed"])


def figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw the accuracy drop by layer, with the source's tokens and with a model's own tokens put back."""
    curves = drops(changes(runs))
    curves = curves[curves["category"] == MEAN].assign(
        kind=lambda t: t["kind"].where(t["kind"] == SELF, "tokens of " + t["source"])
    )
    title = "Accuracy drop by layer with another model's visual tokens, mean of types"
    return {title: fig.layer_curves(curves, y="accuracy drop", kind="kind")}


def uses(config: Config) -> dict[str, str]:
    """Return the identity of the source, so that other weights in its folder make another run."""
    return {"source": _load(config.source, config.source_revision).fingerprint}


# versions: 2 intervals with their stated coverage; 3 tables name sites and the accuracy drop; 4 all tokens of an option
ANALYSIS = Analysis(
    "patching",
    "Visual tokens of one model inside another (patching)",
    Config,
    run,
    figures,
    summary,
    version=4,
    uses=uses,
)

if __name__ == "__main__":
    main(ANALYSIS)
