"""The plotly template and the kinds of charts that several analyses share."""

from workbench.figures.charts import accuracy_by_type, bars, points
from workbench.figures.colors import color_of, colored, model_colors
from workbench.figures.compared import (
    CHANCE,
    LINES,
    Q95,
    chance_levels,
    difference_dots,
    image_dots,
    layer_curves_named,
    level_words,
    named_curves,
)
from workbench.figures.layer_maps import clickable, layer_heat, layer_strip
from workbench.figures.layers import difference_curves, layer_curves, name_final_norm, with_ceilings
from workbench.figures.maps import (
    Overlay,
    WordMap,
    colored_patches,
    layered_overlays,
    overlays,
    overlays_on_one_scale,
    word_maps,
)
from workbench.figures.score_maps import head_maps, head_maps_of, matrix_maps
from workbench.figures.sweeps import grid_keys, sweep_curves, sweep_figure, sweep_points
from workbench.figures.template import (
    COLORS,
    DASHES,
    EXPORT,
    GRAY,
    Figure,
    javascript,
    new_figure,
    plain_name,
    translucent,
)
from workbench.figures.training import step_curves, step_differences, training_curves

__all__ = [
    "CHANCE",
    "COLORS",
    "DASHES",
    "EXPORT",
    "GRAY",
    "LINES",
    "Q95",
    "Figure",
    "Overlay",
    "WordMap",
    "accuracy_by_type",
    "bars",
    "chance_levels",
    "clickable",
    "color_of",
    "colored",
    "colored_patches",
    "difference_curves",
    "difference_dots",
    "grid_keys",
    "head_maps",
    "head_maps_of",
    "image_dots",
    "javascript",
    "layer_curves",
    "layer_curves_named",
    "layer_heat",
    "layer_strip",
    "layered_overlays",
    "level_words",
    "matrix_maps",
    "model_colors",
    "name_final_norm",
    "named_curves",
    "new_figure",
    "overlays",
    "overlays_on_one_scale",
    "plain_name",
    "points",
    "step_curves",
    "step_differences",
    "sweep_curves",
    "sweep_figure",
    "sweep_points",
    "training_curves",
    "translucent",
    "with_ceilings",
    "word_maps",
]
