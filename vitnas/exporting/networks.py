"""A trained network by what a user types."""

from __future__ import annotations

from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vitnas.errors import UserError
from vitnas.exporting.timm_dir import load_timm
from vitnas.model import Model
from vitnas.model.official import read_checkpoint
from vitnas.model.registry import fit_weights
from vitnas.model.trained import find_trained


def load_network(text: str, *, what: str) -> nn.Module:
    """The network in evaluation mode.

    Args:
        text: a folder that `save_timm` wrote; a name of timm's, with its published weights; or `NAME@FILE`, a name and
            a checkpoint (safetensors, or a torch file of which only tensors are read).
        what: the field that `text` stands in, for errors.

    Raises:
        UserError: no such folder, name or file; weights that are not at hand or do not fit.
    """
    given = find_trained(text, what=what)
    if given.folder:
        return load_timm(given.folder)
    state = read_checkpoint(given.file) if given.file else None
    try:
        made = timm.create_model(given.name, pretrained=True) if state is None else _filled(given.name, state)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise UserError(
            f"{what} {text!r} cannot be loaded ({' '.join(str(error).split())[:160]}); it must be a folder of a saved "
            "model, or a timm name whose weights are at hand, or NAME@FILE. Train one first, or choose another."
        ) from error
    return made.eval()


def _filled(name: str, state: dict[str, Tensor]) -> Any:
    """timm's `name` with these weights, for as many classes and channels as they are."""
    cfg = timm.get_pretrained_cfg(name)
    head, stem = (_weight(state, getattr(cfg, part, None)) for part in ("classifier", "first_conv"))
    options = {"num_classes": 0 if head is None else len(head)} | (
        {} if stem is None else {"in_chans": stem.shape[1]}
    )
    model = timm.create_model(name, **options)
    if isinstance(model, VisionTransformer):
        state = checkpoint_filter_fn(state, model)  # positions of another image size
    elif isinstance(model, Model):
        state = fit_weights(state, model)
    model.load_state_dict(state)
    return model


def _weight(state: dict[str, Tensor], layers: str | tuple[str, ...] | None) -> Tensor | None:
    """Of a layer by timm's name for it, or of the first of several, as distilled networks have."""
    return state.get(f"{layers[0] if isinstance(layers, tuple) else layers}.weight")
