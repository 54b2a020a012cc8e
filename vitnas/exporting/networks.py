"""A trained network by what a user types: a folder of a saved model, a timm name, or that and a file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from vitnas.errors import UserError, nearest
from vitnas.exporting.timm_dir import load_timm


def load_network(text: str, *, what: str) -> nn.Module:
    """The network in evaluation mode.

    Args:
        text: a folder that `save_timm` wrote; a name of timm's, with its published weights; or `NAME@FILE`, a name and
            a checkpoint (safetensors, or a torch file of which only tensors are read).
        what: the field that `text` stands in, for errors.

    Raises:
        UserError: no such folder, name or file; weights that are not at hand or do not fit.
    """
    name, _, file = text.partition("@")
    if Path(text).is_dir():
        return load_timm(text)
    if not file and Path(text).suffix in (".pth", ".pt", ".bin", ".safetensors"):
        raise UserError(
            f"{what} is {text!r}; a file of weights does not say what they are of. Write NAME@{text}, for example "
            f"vit_tiny_patch16_224@{text}."
        )
    check_timm_name(name, what=what)
    try:
        made = _with_weights(name, Path(file)) if file else timm.create_model(name, pretrained=True)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise UserError(
            f"{what} {text!r} cannot be loaded ({' '.join(str(error).split())[:160]}); it must be a folder of a saved "
            "model, or a timm name whose weights are at hand, or NAME@FILE. Train one first, or choose another."
        ) from error
    return made.eval()


def check_timm_name(name: str, *, what: str) -> None:
    """Raise UserError where timm does not know `name`, which stands in the field `what`."""
    known, _, _ = name.partition(".")  # of the weights' tag
    if ":" not in name and not timm.is_model(known):  # hf-hub: and the like
        raise UserError(
            f"{what} is {name!r}; it must be a folder of a saved model or a name that timm knows."
            f"{nearest(known, timm.list_models())}"
        )


def _with_weights(name: str, file: Path) -> Any:
    """timm's `name`, with as many classes and channels as the file has, and its weights."""
    state = load_state_dict(str(file))
    cfg = timm.get_pretrained_cfg(name)
    head, stem = (state.get(f"{getattr(cfg, part, '')}.weight") for part in ("classifier", "first_conv"))
    options = {"num_classes": 0 if head is None else len(head)} | (
        {} if stem is None else {"in_chans": stem.shape[1]}
    )
    model = timm.create_model(name, **options)
    if isinstance(model, VisionTransformer):
        state = checkpoint_filter_fn(state, model)  # positions of another image size
    model.load_state_dict(state)
    return model
