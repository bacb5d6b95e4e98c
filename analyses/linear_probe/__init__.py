"""What a linear probe can predict from the visual tokens of each layer: class, color, foreground, position and count.

    python -m analyses.linear_probe --model runs/baseline runs/viral --vfm dinov2-small --data shapes:val --limit 200

Probes are scikit-learn's logistic regression (class, colour, foreground) and ridge regression (x, y, count). They are
fitted on some images and scored on others (GroupKFold over images, the same folds for every layer, target and model),
with features standardized on the fitted images and a fixed penalty `l2`. They are fitted to the layers 0 to L, to the
vision encoder's features that the projector receives (called "tower" in the tables) and, as ceilings, to the features
of frozen VFMs on the same pixels.

    class, colour   of the object that covers at least `cover` of a token's patch; balanced accuracy, chance 1 / classes
    foreground      such a patch against one that no object touches; balanced accuracy, chance 1 / 2
    x, y            center of the token's patch, in fractions of the image; R2, chance 0
    count           number of objects in the image, from the mean of all its visual tokens; R2, chance 0

Control tasks (Hewitt and Liang 2019, arXiv 1909.03368) have the same inputs, probe and folds, but meaningless labels.
Selectivity is score - control, or score - chance where the control is below chance: ridge regression on meaningless
labels has a negative R2, for which the score should get no credit.

    class, colour   labels are permuted between the objects of all images; all tokens of an object share one label
    foreground      the objects of another image: how much the position alone tells
    x, y            coordinates are permuted between the patches of the grid, once for all images: a probe that only
                    knows which patch it is in has a high score here
    count           labels are permuted between images

What the numbers are: whether a linear readout exists and generalizes to other images. What they are not: whether the
model uses it. Intervals and paired differences resample images and keep the out-of-fold predictions fixed, so they
contain neither the variation from fitting the probes to other images nor that of training seeds.
"""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
import pandas as pd

from analyses.linear_probe.drawing import figures, summary
from analyses.linear_probe.fitting import fit_probe
from analyses.linear_probe.options import ENCODER, Config
from analyses.linear_probe.sampling import Tokens, read_chunk
from analyses.linear_probe.tasks import tasks_of
from workbench.analysis.declaration import Analysis, Context, Result, vfm_inputs
from workbench.capture.hidden_states import check_layers
from workbench.errors import DataError
from workbench.vfm import OWN, load_vfm

log = logging.getLogger(__name__)


def run(config: Config, context: Context) -> Result:
    """Read tokens of every layer, the vision encoder and the VFMs, and fit every probe with its controls."""
    layers = check_layers(context.mllm, config.layers, final_norm=config.final_norm)
    images = [scene[0] for scene in context.data.scenes]
    if len(images) < config.folds:
        raise DataError(f"{len(images)} images for {config.folds} folds: expected at least as many images as folds")
    vfms = {name: load_vfm(name) for name in config.vfm if name != OWN}
    fn = partial(read_chunk, config, context, layers, images, vfms)
    parts = context.map("tokens to probe", images, fn, depends=context.data.fingerprint, keep=False)
    skipped = next(({ENCODER: part.record["skipped"]} for part in parts if part.record["skipped"]), {})
    if skipped:
        log.warning("%s: the vision encoder is left out: %s", context.mllm.name, skipped[ENCODER])
    tokens = Tokens()
    for part in parts:
        tokens.take(part, without=set(skipped))
    tasks, left_out = tasks_of(config, context.data.name, images, tokens)
    rows, values_by_image = [], []
    order = [name for name in (*map(str, layers), ENCODER, *vfms) if name in tokens.features]
    for name in context.progress(order, "fitting probes", len(order)):
        x, means = np.concatenate(tokens.features[name]), np.concatenate(tokens.means[name])
        for task in tasks:
            row, per_image = fit_probe(config, task, x[task.rows] if task.rows is not None else means[task.images])
            names = {
                "layer": int(name) if name.isdigit() else -1,
                "source": "model" if name.isdigit() else name,
                "target": task.name,
            }
            rows.append(names | row)
            values_by_image.append(per_image.assign(**names, image_id=[images[i].image_id for i in task.images]))
    record = {
        "vfms": [vfm.record() for vfm in vfms.values()],
        "skipped": skipped | left_out,
        "classes": {task.name: task.classes for task in tasks},
    }
    tables = {"scores": pd.DataFrame(rows), "per_image": pd.concat(values_by_image, ignore_index=True)}
    return Result(tables, record=record)


# version 2: intervals that reach their nominal coverage
ANALYSIS = Analysis(
    "linear_probe",
    "What a linear probe predicts from the visual tokens of each layer",
    Config,
    run,
    figures,
    summary,
    version=2,
    uses=vfm_inputs,
)
