"""Residual re-injection: what the image was before the language model, added again to its visual tokens after some
blocks (docs/paper.md, variants).

    e_img[l] += P_phi(z)     source `projector`: the visual tokens as the first block received them; no new weights
    e_img[l] += A_l(z)       source `encoder`: a light adapter of its own for each layer, A_l(z) = W_l norm(z) + b_l,
                             which starts at zero

with z what the connector receives. It is part of the model: it acts in training and at inference, at the visual
positions of the prompt only (while decoding, these stay in the cache as they are, and no other position is touched). A
model folder says so in its config.json (`visual_residual`) and has the adapters beside it; `MLLM.load` attaches them
again. Plain transformers ignores both and computes another model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import cached_file

from workbench.errors import ConfigError, ModelError, one_line
from workbench.mllm.family import family_of
from workbench.weights.pretrained import call

Source = Literal["encoder", "projector"]
KEY = "visual_residual"  # in config.json
FILE = "visual_residual.safetensors"


class Adapter(nn.Linear):
    """A_l(z) = W_l norm(z) + b_l, with W_l and b_l zero at first: training begins with the model as it is."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(nn.functional.layer_norm(features.to(self.weight), (self.in_features,)))


class Residual(nn.Module):
    """The adapters (none for `projector`) and what a pass must remember; made by `attach_residual`."""

    def __init__(self, source: Source, layers: Sequence[int], features: int, width: int) -> None:
        super().__init__()
        self.source, self.layers, self.features = source, tuple(layers), features
        self.adapters = nn.ModuleList(Adapter(features, width) for _ in layers if source == "encoder")
        self._visual: Tensor | None = None  # (sample, position), None in a pass without images
        self._first: Tensor | None = None  # what the first block received
        self._tower: Tensor | None = None  # what the connector received
        self._fresh = self._running = False

    @property
    def settings(self) -> dict[str, Any]:
        """What config.json says."""
        return {"source": self.source, "layers": list(self.layers), "features": self.features}

    def install(self, model: Any, connector: nn.Module) -> None:
        """Make it part of `model`, for good.

        Blocks and connector are wrapped rather than hooked: their output is then the sum, for whoever reads or edits it
        (nnsight's interventions act between a module's forward and its hooks).
        """
        decoder = model.get_decoder()
        decoder = getattr(decoder, "model", decoder)
        model.register_forward_pre_hook(partial(self._begin, model.config.image_token_id), with_kwargs=True)
        model.register_forward_hook(self._end, always_call=True)
        decoder.register_forward_pre_hook(self._check_running)
        _wrap(decoder.layers[0], before=self._keep_first)
        _wrap(connector, before=self._keep_tower)
        for number, layer in enumerate(self.layers):
            _wrap(decoder.layers[layer - 1], after=partial(self._add, number))

    def _begin(self, image_token: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Images come with the prompt; a token that is decoded after it is none, whatever its id."""
        self._running, self._visual, self._first = True, None, None
        if kwargs.get("pixel_values") is None and not kwargs.get("mm_encoder_outputs"):
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise ModelError(
                "this model adds its image again at the visual positions: expected input_ids, which say where these are"
            )
        self._visual = ids == image_token

    def _end(self, *_: object) -> None:
        self._running = self._fresh = False

    def _check_running(self, *_: object) -> None:
        if not self._running:
            raise ModelError(
                "this model adds its image again in the middle of its language model, which cannot run without the"
                " rest: expected the whole model"
            )

    def _keep_first(self, hidden: Tensor) -> None:
        self._first = hidden

    def _keep_tower(self, features: Tensor) -> None:
        self._tower, self._fresh = features, True

    def _add(self, number: int, output: Any) -> Any:
        if self._visual is None:
            return output
        if isinstance(output, tuple):
            return (self._add(number, output[0]), *output[1:])
        visual, hidden = self._visual.to(output.device), output.clone()
        hidden[visual] = hidden[visual] + self._image(number, visual).to(hidden)
        return hidden

    def _image(self, number: int, visual: Tensor) -> Tensor:
        """What is added, one row for each visual token."""
        if self.source == "projector":
            assert self._first is not None
            return self._first[visual.to(self._first.device)]
        if self._tower is None or not self._fresh:
            raise ModelError(
                "this model adds its image again from the encoder's features: expected an image that goes through the"
                " connector in this pass"
            )
        rows = self._tower.reshape(-1, self.features)
        if len(rows) != int(visual.sum()):
            raise ModelError(
                f"{len(rows)} encoder features for {int(visual.sum())} visual tokens: expected one for each"
            )
        return self.adapters[number](rows)


def _wrap(
    module: Any, *, before: Callable[[Tensor], None] | None = None, after: Callable[[Any], Any] | None = None
) -> None:
    """Let `module` show its first argument to `before`, and pass its output through `after`."""
    wrapped_before = vars(module).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        # the class's own is looked up anew: FSDP gives the module another class, whose forward alone knows of
        # activation checkpointing
        return (
            wrapped_before(*args, **kwargs)
            if wrapped_before is not None
            else type(module).forward(module, *args, **kwargs)
        )

    @wraps(module.forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(args[0] if args else kwargs["hidden_states"])
        output = forward(*args, **kwargs)
        return output if after is None else after(output)

    module.forward = wrapped


def attach_residual(model: Any, source: Source, layers: Sequence[int], features: int | None = None) -> Residual:
    """Add the image again to the visual tokens after `layers` (1 to L) of a transformers model of one of our families,
    and say so in its config.

    Args:
        features: width of what the connector receives; needed for `encoder`.

    Raises:
        ConfigError: a layer that the model does not have.
        ModelError: `encoder` in a family whose connector does not give one visual token for each row it receives.
    """
    family, text = family_of(model.config), model.config.get_text_config()
    for layer in layers:
        if not 1 <= layer <= text.num_hidden_layers:
            raise ConfigError(
                f"residual layer is {layer}: expected 1 to {text.num_hidden_layers}, the layers of the model"
            )
    if source == "encoder" and not family.shares_prefix:
        raise ModelError(
            f"family '{family.name}' does not give one visual token for each feature of the encoder: expected residual"
            " projector, or a LLaVA"
        )
    residual = Residual(source, layers, features or 0, text.hidden_size)
    residual.install(model, model.model.get_submodule(family.projector))
    setattr(model.config, KEY, residual.settings)
    return residual


def save_residual(residual: Residual, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write the adapters, whose tensors are `state`, beside the model; config.json has the rest."""
    if len(residual.adapters):
        save_file(dict(state), folder / FILE)


def load_residual(model: Any, name: str, revision: str | None = None) -> Residual | None:
    """Attach what the config of the model called `name` asks for, if anything.

    Raises:
        ModelError: its adapters are not there, or do not fit.
    """
    settings: Mapping[str, Any] | None = getattr(model.config, KEY, None)
    if settings is None:
        return None

    def failed(error: object) -> ModelError:
        return ModelError(
            f"model '{name}' adds its image again ({KEY} in its config.json), but {FILE} is missing or does not fit"
            f" ({one_line(error, 100)})"
        )

    if (
        not isinstance(settings, Mapping)
        or not {"source", "layers", "features"} <= settings.keys()
        or not isinstance(settings["layers"], list)
    ):
        raise failed(f"{KEY} is {one_line(settings, 60)}")
    residual = attach_residual(model, settings["source"], settings["layers"], settings["features"])
    if len(residual.adapters):
        tensors = call(lambda: load_file(str(cached_file(name, FILE, revision=revision))), failed)
        call(lambda: residual.adapters.load_state_dict(tensors), failed)
    weight = next(model.parameters())
    return residual.to(weight.device).eval()
