"""Whether training left alone what it should: fingerprints of frozen parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from workbench.errors import WeightsError
from workbench.hashing import fingerprint, saved_tensors
from workbench.vfm import VFM


def frozen_fingerprint(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Of all parameters that are not trained, whose values are in `state`."""
    return fingerprint({name: state[name] for name, p in model.named_parameters() if not p.requires_grad})


def check_frozen(model: nn.Module, state: Mapping[str, Tensor], frozen: str, vfms: Sequence[VFM]) -> None:
    """See that the frozen parameters of `model` are those of `frozen`, their fingerprint before, and that each VFM is
    what was loaded.

    Raises:
        WeightsError: one of them is not.
    """
    if frozen_fingerprint(model, state) != frozen:
        raise WeightsError("a frozen part of the model changed while it was trained; nothing is stored")
    for vfm in vfms:
        if fingerprint(saved_tensors(vfm.network)) != vfm.fingerprint:
            raise WeightsError(f"{vfm.name} changed while the model was trained; nothing is stored")
