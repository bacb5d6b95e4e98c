"""Residual re-injection: add the image again to its visual tokens after some blocks (docs/paper.md, variants).

    e_img[l] += P_phi(z)     source `projector`: the visual tokens as the first block received them; no new weights
    e_img[l] += A_l(z)       source `encoder`: one light adapter per layer, A_l(z) = W_l norm(z) + b_l, zero at first

Here z is the projector's input. The residual is part of the model: it acts in training and at inference, and only at
the visual positions of the prompt (while decoding, these stay in the cache unchanged, and no other position is
touched). The config.json of a model folder has its settings (`visual_residual`), the adapters are in a file beside it,
and `MLLM.load` attaches them again. Plain transformers ignores both, and so computes another model.
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
    """A_l(z) = W_l norm(z) + b_l. W_l and b_l are zero at first, so training starts from the unchanged model."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(nn.functional.layer_norm(features.to(self.weight), (self.in_features,)))


class Residual(nn.Module):
    """The adapters (none for `projector`), and what a forward pass must remember; made by `attach_residual`."""

    def __init__(self, source: Source, layers: Sequence[int], features: int, width: int) -> None:
        super().__init__()
        self.source, self.layers, self.features = source, tuple(layers), features
        self.adapters = nn.ModuleList(Adapter(features, width) for _ in layers if source == "encoder")
        self._expected: Tensor | None = None  # the mask of the next forward pass, if it is called with embeddings
        self._visual: Tensor | None = None  # mask (sample, position), None in a forward pass without images
        self._first_input: Tensor | None = None  # input of the first block
        self._encoder_features: Tensor | None = None  # input of the projector
        self._features_are_new = False  # whether `_encoder_features` belong to this forward pass
        self._running = False  # whether the whole model runs, not the language model alone

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings that config.json stores."""
        return {"source": self.source, "layers": list(self.layers), "features": self.features}

    def install(self, model: Any, projector: nn.Module) -> None:
        """Make the residual part of `model`; it cannot be removed.

        Blocks and projector are wrapped, not hooked: their output then includes the residual for everybody who reads or
        edits it (nnsight's interventions act between a module's forward and its hooks).
        """
        decoder = model.get_decoder()
        decoder = getattr(decoder, "model", decoder)
        model.register_forward_pre_hook(partial(self._begin, model.config.image_token_id), with_kwargs=True)
        model.register_forward_hook(self._end, always_call=True)
        decoder.register_forward_pre_hook(self._check_running)
        _wrap(decoder.layers[0], before=self._keep_first_input)
        _wrap(projector, before=self._keep_features)
        for number, layer in enumerate(self.layers):
            _wrap(decoder.layers[layer - 1], after=partial(self._add, number))

    def expect(self, visual: Tensor) -> None:
        """Say where the visual tokens of the next forward pass are, which has embeddings instead of token ids.

        Args:
            visual: mask (sample, position).
        """
        self._expected = visual

    def _begin(self, image_token: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the visual positions of a prompt; a decoded token is never visual, whatever its id."""
        self._running, self._first_input = True, None
        self._visual, self._expected = self._expected, None
        if self._visual is not None:
            return
        if kwargs.get("pixel_values") is None and not kwargs.get("mm_encoder_outputs"):
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise ModelError(
                "this model adds its image again at the visual positions, so it must know them: call it with input_ids"
            )
        self._visual = ids == image_token

    def _end(self, *_: object) -> None:
        self._running = self._features_are_new = False

    def _check_running(self, *_: object) -> None:
        if not self._running:
            raise ModelError(
                "this model adds its image again in the middle of its language model, which therefore cannot run"
                " alone: call the whole model"
            )

    def _keep_first_input(self, hidden: Tensor) -> None:
        self._first_input = hidden

    def _keep_features(self, features: Tensor) -> None:
        self._encoder_features, self._features_are_new = features, True

    def _add(self, number: int, output: Any) -> Any:
        if self._visual is None:
            return output
        if isinstance(output, tuple):
            return (self._add(number, output[0]), *output[1:])
        visual, hidden = self._visual.to(output.device), output.clone()
        hidden[visual] = hidden[visual] + self._summand(number, visual).to(hidden)
        return hidden

    def _summand(self, number: int, visual: Tensor) -> Tensor:
        """Return what is added after layer `self.layers[number]`, one row for each visual token."""
        if self.source == "projector":
            assert self._first_input is not None
            return self._first_input[visual.to(self._first_input.device)]
        # activation checkpointing runs a block again after the forward pass, with the features of that pass
        if self._encoder_features is None or (self._running and not self._features_are_new):
            raise ModelError(
                "this model adds its image again from the vision encoder's features: expected an image that goes"
                " through the projector in this forward pass"
            )
        rows = self._encoder_features.reshape(-1, self.features)
        if len(rows) != int(visual.sum()):
            raise ModelError(
                f"{len(rows)} encoder features for {int(visual.sum())} visual tokens: expected one for each"
            )
        return self.adapters[number](rows)


def _wrap(
    module: Any, *, before: Callable[[Tensor], None] | None = None, after: Callable[[Any], Any] | None = None
) -> None:
    """Wrap the forward of `module`: `before` receives its first argument, `after` replaces its output."""
    earlier_wrapper = vars(module).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        if earlier_wrapper is not None:
            return earlier_wrapper(*args, **kwargs)
        # Look up the class's forward at each call: FSDP gives the module another class, and only that class's forward
        # does activation checkpointing.
        return type(module).forward(module, *args, **kwargs)

    @wraps(module.forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(args[0] if args else kwargs["hidden_states"])
        output = forward(*args, **kwargs)
        return output if after is None else after(output)

    module.forward = wrapped


def attach_residual(model: Any, source: Source, layers: Sequence[int], features: int | None = None) -> Residual:
    """Make a transformers model add its image again to the visual tokens, and write that into its config.

    Args:
        model: of one of our families.
        source: what is added, see the top of this file.
        layers: after which layers (1 to L).
        features: width of the projector's input; needed for the source `encoder`.

    Raises:
        ConfigError: a layer that the model does not have.
        ModelError: the source `encoder` in a family whose projector does not give one visual token for each row of its
            input.
    """
    family, text = family_of(model.config), model.config.get_text_config()
    for layer in layers:
        if not 1 <= layer <= text.num_hidden_layers:
            raise ConfigError(
                f"residual layer is {layer}: expected 1 to {text.num_hidden_layers}, the layers of the model"
            )
    if source == "encoder" and not family.shares_prefix:
        raise ModelError(
            f"family '{family.name}' does not give one visual token for each row of encoder features: expected the"
            " residual 'projector', or a LLaVA"
        )
    residual = Residual(source, layers, features or 0, text.hidden_size)
    residual.install(model, model.model.get_submodule(family.projector))
    setattr(model.config, KEY, residual.settings)
    return residual


def save_residual(residual: Residual, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write the adapters, whose tensors are `state`, into a model folder; its config.json has the rest."""
    if len(residual.adapters):
        save_file(dict(state), folder / FILE)


def load_residual(model: Any, name: str, revision: str | None = None) -> Residual | None:
    """Attach the residual that the config of `model` asks for, or return None if it asks for none.

    Args:
        name: folder or hub id that the adapters are read from.
        revision: of the hub id.

    Raises:
        ModelError: the adapters are missing or do not fit.
    """
    settings: Mapping[str, Any] | None = getattr(model.config, KEY, None)
    if settings is None:
        return None

    def failed(error: Exception) -> ModelError:
        return ModelError(
            f"model '{name}' adds its image again ({KEY} in its config.json), but {FILE} is missing or does not fit"
            f" ({one_line(error, 100)}): expected it beside config.json"
        )

    complete = isinstance(settings, Mapping) and {"source", "layers", "features"} <= settings.keys()
    if not complete or not isinstance(settings["layers"], list):
        raise ModelError(
            f"model '{name}' has {KEY} {one_line(settings, 60)} in its config.json: expected a mapping with source,"
            " layers (a list) and features"
        )
    residual = attach_residual(model, settings["source"], settings["layers"], settings["features"])
    if len(residual.adapters):
        tensors = call(lambda: load_file(str(cached_file(name, FILE, revision=revision))), failed)
        call(lambda: residual.adapters.load_state_dict(tensors), failed)
    weight = next(model.parameters())
    return residual.to(weight.device).eval()
