"""A trained network by what a user types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitnas.errors import UserError, first_line
from vitnas.exporting.timm_dir import load_timm
from vitnas.grids import Grid, ImageSize, sides_of
from vitnas.measure.convert import quiet
from vitnas.model.official import read_checkpoint
from vitnas.model.trained import HUB, Trained, find_trained


def load_network(
    text: str,
    *,
    what: str,
    image_size: ImageSize | None = None,
    check: Callable[[nn.Module], object] | None = None,
) -> nn.Module:
    """The network in evaluation mode, with finite weights.

    Args:
        text: a folder that `save_timm` wrote, or a run that has such folders; a name of timm's, with its published
            weights; or `NAME@FILE`, a name and a checkpoint (safetensors, or a torch file of which only tensors are
            read).
        what: the field that `text` stands in, for errors.
        image_size: what a checkpoint's network is made for, in pixels; its positions are resampled once, as timm does.
            By default, and where its patches do not divide that, the name's own.
        check: refuses a network that will not do; of a name of timm's it is asked before the weights are fetched, by a
            network without them.

    Raises:
        UserError: what `check` refuses; no such folder, name or file; weights that are not at hand, do not fit or are
            not finite.
    """
    given = find_trained(text, what=what)
    if check and given.folder is None and given.file is None and not given.name.startswith(HUB):
        with torch.device("meta"):
            check(timm.create_model(given.name.partition(".")[0]))
    made = _loaded(given, text, what, image_size)
    if check:
        check(made)
    return _finite(made, text, what)


def _loaded(given: Trained, text: str, what: str, image_size: ImageSize | None) -> Any:
    if given.folder:
        return load_timm(given.folder)
    try:
        with quiet():
            if given.file:
                made = _filled(given.name, given.file, image_size)
            else:
                made = timm.create_model(given.name, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # timm's filters of checkpoints fail in many ways
        raise UserError(
            f"{what} {text!r} cannot be loaded ({' '.join(str(error).split())[:160]}); it must be a folder of a saved "
            "model, or a timm name whose weights are at hand, or NAME@FILE. Train one first, or choose another."
        ) from error
    return made.eval()


def untrained(given: Trained, text: str, *, what: str) -> Any:
    """timm's network of that name, or of a folder, without its weights.

    Args:
        text: by which it was found.
        what: the field that `text` stands in, for errors.

    Raises:
        UserError: a tag, a place or a folder that is none.
    """
    try:
        return timm.create_model(given.name)
    except UserError:
        raise
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        why = f"its config.json has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(
            f"{what} {text!r} cannot be made ({why}); it must be a folder of a saved model or a name "
            "that timm knows. Correct it."
        ) from error


def _filled(name: str, file: Path, image_size: ImageSize | None) -> Any:
    """timm's `name` with a file's weights, for as many classes and channels as they are.

    timm's own loading does the rest: other names of the authors', positions and patches of other sizes.
    """
    with torch.device("meta"):
        plain = timm.create_model(name)
    state = read_checkpoint(file, wanted=plain.state_dict().keys())
    cfg = plain.pretrained_cfg
    head, stem = (_weight(state, cfg.get(part)) for part in ("classifier", "first_conv"))
    classes = 0 if head is None else len(head)
    chans = cfg["input_size"][0] if stem is None else stem.shape[1]
    sides, options = tuple(cfg["input_size"][1:]), {}
    if image_size is not None and _divides(plain, sides_of(image_size)):
        sides, options = sides_of(image_size), {"img_size": sides_of(image_size)}
    overlay = {"num_classes": classes, "input_size": (chans, *sides), "label_offset": 0, "custom_load": False}
    model = timm.create_model(
        name,
        pretrained=True,
        num_classes=classes,
        in_chans=chans,
        pretrained_cfg_overlay={**overlay, "source": "", "state_dict": state},
        **options,
    )
    for kept in (model.pretrained_cfg, model.default_cfg):  # or the weights would be held twice
        kept.pop("state_dict", None)
    return model


def _divides(model: Any, sides: Grid) -> bool:
    """Whether images of these sides are whole patches of the model's; a network without patches takes any size."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return patch is not None and all(side % one == 0 for side, one in zip(sides, patch, strict=True))


def _weight(state: dict[str, Tensor], layers: str | tuple[str, ...] | None) -> Tensor | None:
    """Of a layer by timm's name for it, or of the first of several, as distilled networks have."""
    return state.get(f"{layers[0] if isinstance(layers, tuple | list) else layers}.weight")


def _finite(model: nn.Module, text: str, what: str) -> nn.Module:
    """The model, unless a weight is no number."""
    bad = [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(
            f"{what} {text!r} has weights that are NaN or infinite ({bad[0]}{more}); every weight must be a number. "
            "Take an earlier checkpoint, or train it again."
        )
    return model
