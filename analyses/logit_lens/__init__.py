"""The words that visual tokens predict at each layer (logit lens), and whether they name the object under the token.

    python -m analyses.logit_lens --model runs/baseline runs/viral --data shapes:val --limit 200 --output_dir runs

The model's own final norm and output head are applied to the visual tokens of layers 0 to L (nostalgebraist 2020; for
visual tokens Neo et al. 2024, arXiv 2410.07149). At layer L this gives the model's own output at these positions, which
is checked for every model.

What the numbers are: for tokens whose patch is covered by an object by at least `cover`, the probability and the rank
of the object's color and class words. Rank 1 is the most likely token of the vocabulary. A word is represented by its
first token after a space; the run's record lists these tokens, and the words that were left out. `first` and
`candidate_rank` compare the words of one kind (all colors or all classes of the data set) with one another,
`reciprocal_rank` the whole vocabulary. Tokens whose patch no object touches (`background`) are scored by the words of a
random object of their image. The null gives each token the words of a random token of another image. Every image has
the same weight.

What they are not: what a layer knows. A token is trained to serve later tokens, not to predict a word at its own
position, so information that the lens does not find may still be there (see linear_probe). Every image is read with the
same prompt, so that no question can give the answer away.
"""

from __future__ import annotations

from functools import partial

from analyses.logit_lens.drawing import figures, summary
from analyses.logit_lens.reading import Reading, read_chunk
from analyses.logit_lens.scores import score_tables
from analyses.logit_lens.words import Config, words_of
from workbench.analysis.chunks import joined
from workbench.analysis.declaration import Analysis, Context, Result
from workbench.capture.hidden_states import check_layers


def run(config: Config, context: Context) -> Result:
    """Apply the lens to the layers, score tokens on objects and background, and store word maps of a few images."""
    layers = check_layers(context.mllm, config.layers)
    images = [scene[0] for scene in context.data.scenes]
    words = words_of(config, context, images)
    depends = [words.names, words.tokens, words.kinds]  # the words of all objects of the data set
    parts = context.map(
        "words of visual tokens", images, partial(read_chunk, config, context, layers, words), depends=depends
    )
    tables = {"maps": joined(parts, "maps")}
    tensors = {name: value for part in parts for name, value in part.tensors.items() if name.startswith("image_")}
    if config.scores:
        reading, vocabulary = Reading(), max(part.record["vocabulary"] for part in parts)
        for part in parts:
            reading.take(part)
        tables["scores"], tables["per_image"] = score_tables(
            config, reading, words, layers, [s.image_id for s in images], vocabulary
        )
    return Result(tables, tensors, words.record | {"layers": layers})


# version 2: intervals that reach their nominal coverage
ANALYSIS = Analysis(
    "logit_lens",
    "Which words the visual tokens predict at each layer (logit lens)",
    Config,
    run,
    figures,
    summary,
    version=2,
)
