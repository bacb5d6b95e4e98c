"""InternVL: square tiles and a thumbnail; the size of an image decides how it is cut.

InternVLForConditionalGeneration
  model.vision_tower            InternViT
  model.multi_modal_projector   after a pixel shuffle
  model.language_model          decoder: .layers, .norm
"""

from __future__ import annotations

from functools import partial

from transformers import PretrainedConfig
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from workbench.mllm.families.tiles import Cuts, tiled
from workbench.mllm.family import FAMILIES, Batch, Family, Processor
from workbench.mllm.processors import internvl_settings


def _cuts(config: PretrainedConfig, processor: Processor, batch: Batch, sample: int) -> Cuts:
    """Compute how each image is cut from its size, as the processor does."""
    images = processor.image_processor
    # transformers before 5.23 has the processor's defaults in a class beside it
    options = getattr(processor, "images_kwargs", None) or processor.valid_processor_kwargs._defaults["images_kwargs"]
    if not options.get("crop_to_patches", images.crop_to_patches) or images.max_patches < 2:
        return [(0, 0)] * len(batch.images[sample])
    size = (images.size["height"], images.size["width"])
    cuts = [
        get_optimal_tiled_canvas((image.height, image.width), size, images.min_patches, images.max_patches)[::-1]
        for image in batch.images[sample]
    ]
    return [(rows, columns) if rows * columns > 1 else (0, 0) for rows, columns in cuts]


INTERNVL = FAMILIES.add(
    "internvl",
    Family("internvl", ("InternVLForConditionalGeneration",), partial(tiled, _cuts), shared_settings=internvl_settings),
)
