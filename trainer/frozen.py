"""Fingerprints of frozen parameters, to check that training did not change them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from workbench.errors import WeightsError
from workbench.hashing import fingerprint, saved_tensors
from workbench.vfm import VFM


def frozen_fingerprint(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Return the fingerprint of what training must not change; `state` has the values.

    These are the parameters that are not trained, and the stored buffers of modules without a trained parameter, such
    as the running means of a frozen normalization.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for prefix, module in model.named_modules():
        if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            frozen |= {f"{prefix}.{name}".removeprefix(".") for name, _ in module.named_buffers(recurse=False)}
    return fingerprint({name: state[name] for name in frozen & state.keys()})


def check_frozen(model: nn.Module, state: Mapping[str, Tensor], frozen: str, vfms: Sequence[VFM]) -> None:
    """Check that training changed neither the frozen parameters of the model nor the VFMs.

    Args:
        model: the trained model.
        state: its tensors, whole.
        frozen: `frozen_fingerprint` of the model before the training.
        vfms: as they were loaded.

    Raises:
        WeightsError: one of them changed.
    """
    if frozen_fingerprint(model, state) != frozen:
        raise WeightsError(
            "a frozen part of the model changed while it was trained, so no model is stored: check whether a hook or"
            " another package writes to its weights"
        )
    for vfm in vfms:
        if fingerprint(saved_tensors(vfm.network)) != vfm.fingerprint:
            raise WeightsError(
                f"{vfm.name} changed while the model was trained, so no model is stored: check whether a hook or"
                " another package writes to its weights"
            )
