"""What one model reads in another model's visual tokens: those of `source` at layer l are put into each model at layer
l.

    python -m analyses.patching --model runs/baseline runs/viral --source runs/viral --data shapes:val --limit 200
    --output_dir runs

What the number is: accuracy before minus accuracy after, on the same questions, with an interval over images, and
KL(before || after) of the answer over the question's options, in nats. Two models trained apart need not agree on what
a direction in their tokens means, so a drop does not say that the source's tokens hold less; models that come from one
first stage agree the most. The control `self` puts a model's own tokens, read in a pass of their own, back into it,
which must change nothing; so must a model that is patched with itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from workbench import figures as fig
from workbench.analysis.chunks import Chunk, Part, joined
from workbench.analysis.command import main
from workbench.analysis.declaration import Analysis, Context, DataOptions, Result
from workbench.capture.edit import check_site
from workbench.capture.hidden_states import Activations, check_layers, read
from workbench.data.base import Sample
from workbench.errors import ConfigError, DataError, ModelError
from workbench.mllm import MLLM
from workbench.models import check_revision, label_of, split_name
from workbench.runs import Run
from workbench.scoring.questions import questions_of
from workbench.scoring.quiz import Quiz
from workbench.scoring.tables import change_by_type, changes, drops
from workbench.training_folder import MEAN

log = logging.getLogger(__name__)

PATCHED, SELF = "patched", "self"


@dataclass(frozen=True)
class Config(DataOptions):
    """What is put in, where, and what is asked."""

    source: str = ""
    """The model whose visual tokens are put into the others: a folder or hub id, or NAME=FOLDER."""
    source_revision: str | None = None
    """Branch, tag or commit of a source that is a hub id."""
    layers: tuple[int, ...] = ()
    """Layers, 0 to L; by default all that both models have."""
    types: tuple[str, ...] = ()
    """Question types; all by default."""
    questions: int = 1
    """Questions of each type about an image, 0 for all."""

    def __post_init__(self) -> None:
        for name in ("questions", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected at least 0")


@lru_cache(maxsize=1)
def _load(source: str, revision: str | None) -> MLLM:
    if not source:
        raise ConfigError("no source given: expected --source FOLDER_OR_HUB_ID")
    name = split_name(source)[1]
    check_revision({source: name}, revision)
    return MLLM.load(name, revision=revision)


def run(config: Config, context: Context) -> Result:
    """Ask every question before and after each patch."""
    target, source = context.mllm, _load(config.source, config.source_revision)
    names = label_of(config.source), context.label or label_of(target.name)
    source.model.to(target.device)
    scenes = questions_of(context.data.scenes, types=config.types, each=config.questions)
    check_pair(target, source)
    for mllm in (target, source):
        _check_prefix(mllm, scenes[0][0])
    layers, skipped = _layers(target, source, config)
    samples = joined(
        context.map("patched questions", scenes, partial(_patched, target, source, layers, names)), "samples"
    )
    record = {"source_fingerprint": source.fingerprint, "skipped": skipped}
    return Result({"scores": _scores(samples, names[0], config), "samples": samples}, record=record)


def _patched(target: MLLM, source: MLLM, layers: list[int], names: tuple[str, str], chunk: Chunk[list[Sample]]) -> Part:
    """The questions of a chunk before and after the tokens of the source, and the target's own, are put in at each
    layer."""
    tables = []
    for _, scenes in chunk.batches():
        quiz = Quiz(target, scenes, chunk.batch_size)
        before = quiz.logprobs()
        for kind, mllm in ((PATCHED, source), (SELF, target)):
            batch = mllm.encode([scene[0].image for scene in scenes], [scene[0].question for scene in scenes])
            tokens = read(mllm, batch, layers=layers)
            for number, layer in enumerate(layers):
                after = quiz.logprobs(layer, partial(_put, tokens=tokens, number=number, names=names))
                tables.append(quiz.scored(before, after).assign(site=str(layer), layer=layer, kind=kind))
    return Part({"samples": pd.concat(tables, ignore_index=True)})


def check_pair(target: MLLM, source: MLLM) -> None:
    """Raise a ConfigError unless tokens of one fit into the other and both read text alike."""
    widths = [mllm.config.get_text_config().hidden_size for mllm in (source, target)]
    if widths[0] != widths[1]:
        raise ConfigError(
            f"{source.name} has visual tokens of width {widths[0]}, {target.name} of width {widths[1]}: expected the"
            " same width"
        )
    if source.processor.tokenizer.get_vocab() != target.processor.tokenizer.get_vocab():
        raise ConfigError(
            f"{source.name} and {target.name} have different tokenisers: expected the same one, so that both are asked"
            " the same"
        )


def _check_prefix(mllm: MLLM, sample: Sample) -> None:
    """Raise a ModelError if visual tokens depend on the question, since then there is not one set of them to put in."""
    batch = mllm.encode([sample.image] * 2, [sample.question, f"{sample.question} {sample.question}"])
    first, second = (own.values for own in read(mllm, batch))
    if not torch.allclose(first, second, rtol=1e-2, atol=1e-2 * float(first.abs().max())):
        raise ModelError(
            f"the visual tokens of {mllm.name} depend on the question that follows: expected a model that reads the"
            " image first"
        )


def _layers(target: MLLM, source: MLLM, config: Config) -> tuple[list[int], dict[str, str]]:
    """The layers that both models have and that can be changed in both, and why others cannot."""
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
        raise ModelError(f"{target.name}: none of the layers can be patched ({next(iter(skipped.values()))})")
    return layers, skipped


def _put(
    values: Float[Tensor, "token d"], image: int, *, tokens: list[Activations], number: int, names: tuple[str, str]
) -> Float[Tensor, "token d"]:
    """The tokens of the other pass in place of `values`."""
    new = tokens[image].values[number]
    if new.shape != values.shape:
        raise DataError(
            f"{names[0]} has {len(new)} visual tokens where {names[1]} has {len(values)}: expected the same number for"
            " every image"
        )
    return new


def _scores(samples: pd.DataFrame, source: str, config: Config) -> pd.DataFrame:
    rows = []
    for (layer, kind), own in samples.groupby(["layer", "kind"], sort=False):
        named: dict[str, Any] = {"site": str(layer), "layer": layer, "kind": kind, "source": source}
        rows += [named | row for row in change_by_type(own, seed=config.seed)]
    return pd.DataFrame(rows)


def summary(found: Mapping[str, Run]) -> pd.DataFrame:
    """One row per model, layer and kind for the mean of types."""
    table = changes(found)
    return table[table["category"] == MEAN].drop(columns=["layer", "seed"])


def figures(found: Mapping[str, Run]) -> dict[str, go.Figure]:
    """The drop by layer of the patch, and of a model's own tokens put back."""
    curves = drops(changes(found))
    curves = curves[curves["category"] == MEAN].assign(
        kind=lambda t: t["kind"].where(t["kind"] == SELF, "tokens of " + t["source"])
    )
    return {
        "Drop by layer with another model's visual tokens, mean of types": fig.layer_curves(
            curves, y="drop in accuracy", kind="kind"
        )
    }


def uses(config: Config) -> dict[str, str]:
    """The identity of the source: the same folder with other weights is another question."""
    return {"source": _load(config.source, config.source_revision).fingerprint}


# 2: intervals that cover what they say
ANALYSIS = Analysis(
    "patching",
    "Visual tokens of one model inside another (patching)",
    Config,
    run,
    figures,
    summary,
    version=3,
    uses=uses,
)

if __name__ == "__main__":
    main(ANALYSIS)
