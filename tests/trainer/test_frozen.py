"""What training must not change, and that a change of any of it is noticed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.frozen import check_frozen, frozen_fingerprint
from workbench.errors import WeightsError


class Model(nn.Module):
    """A frozen normalization, and a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).requires_grad_(False)
        self.trained = nn.BatchNorm1d(3)
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


@pytest.mark.parametrize("name", ["encoder.0.weight", "encoder.1.bias", "encoder.1.running_mean"])
def test_a_changed_frozen_tensor_is_noticed(name: str) -> None:
    model = Model()
    before = frozen_fingerprint(model, model.state_dict())
    model.state_dict()[name].add_(1)
    with pytest.raises(WeightsError, match="a frozen part of the model changed"):
        check_frozen(model, model.state_dict(), before, [])


def test_what_is_trained_may_change() -> None:
    model = Model()
    before = frozen_fingerprint(model, model.state_dict())
    with torch.no_grad():
        model.trained(torch.randn(8, 3))  # moves its running mean
        model.trained.weight.add_(1)
        model.scratch.add_(1)
    check_frozen(model, model.state_dict(), before, [])
