"""The network that a run makes smaller, and its images as it takes them; what cannot be slimmed is refused here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vitnas.arch import Arch
from vitnas.data import Data, DataConfig, has_one_class
from vitnas.errors import UserError
from vitnas.exporting.networks import load_network
from vitnas.grids import ImageSize, size_text
from vitnas.model import Model
from vitnas.model.scale import scale_of
from vitnas.model.timm_keys import arch_in, from_timm
from vitnas.space import AroundConfig, AroundSpace, around
from vitnas.space.around import narrows_heads, options_of
from vitnas.stages.run import Run, SlimConfig
from vitnas.stages.work import RunImages, Work
from vitnas.train.teacher import Pixels

EIGHTHS = tuple(n / 8 for n in range(1, 9))
KEEP = (1.0, 0.7, 0.5)
WIDTHS = (0.5, 0.625, 0.75, 0.875, 1.0)


def load_original(text: str | None, image_size: ImageSize | None = None) -> Model:
    """The trained network that `text` stands for, as a Model in evaluation mode.

    Args:
        image_size: what a checkpoint is loaded for, by default what its name says.

    Raises:
        UserError: it cannot be loaded, or written as an Arch (saying what exactly), has weights that are no numbers, or
            tells numbers in place of classes.
    """
    if not text:
        raise UserError(
            "no network is named; one is slimmed. Write `vitnas slim MODEL`, or pretrained=MODEL."
        )
    network = load_network(text, what="MODEL", image_size=image_size, check=arch_in)
    model = network if isinstance(network, Model) else from_timm(network)
    if scale_of(model):
        raise UserError(
            "MODEL tells numbers of images; what slimming keeps is judged by classes or features. Search for a smaller "
            "network (`vitnas run images data.label_kind=numbers`)."
        )
    return model.eval()


def images_for(config: DataConfig, model: Model, slim: SlimConfig) -> DataConfig:
    """`config` with what it leaves open taken from the network: size, channels, mean, std, crop.

    Raises:
        UserError: images of another size or other channels than the network's.
    """
    arch, own = model.arch, Pixels.of(model)
    asked = config.image_size
    if asked is not None and asked != arch.image_size and not slim.resample:
        raise UserError(
            f"data.image_size is {size_text(asked)}; MODEL takes images of {size_text(arch.image_size)} pixels. Leave "
            "data.image_size out, or add resample=true to slim MODEL with its positions resampled to that size."
        )
    if config.in_chans not in (None, arch.in_chans):
        raise UserError(
            f"data.in_chans is {config.in_chans}; MODEL takes images of {arch.in_chans} channels. Leave it out."
        )
    if arch.in_chans not in (1, 3):
        raise UserError(
            f"MODEL takes images of {arch.in_chans} channels; data are grey or colour, 1 or 3. Use another network."
        )
    crop = None if own.mean is None else model.pretrained_cfg.get("crop_pct")
    return replace(
        config,
        image_size=asked or arch.image_size,
        in_chans=1 if arch.in_chans == 1 else 3,
        mean=config.mean or own.mean,
        std=config.std or own.std,
        crop_pct=config.crop_pct or crop,
    )


def fitted(model: Model, image_size: ImageSize | None) -> Model:
    """The network for images of that size, its positions resampled where it is another."""
    if model.arch.image_size != image_size:
        model.set_input_size(img_size=image_size)
    return model


def check_classes(model: Model, data: Data) -> str:
    """Refuse labels of other classes than the network's; says what becomes of labels that it has no use for.

    Raises:
        UserError: the images have another number of classes.
    """
    own, given = model.num_classes, data.num_classes
    if given and own and given != own:
        raise UserError(
            f"the images have {given} classes and MODEL {own}; labels serve only where both are the same. Add "
            "data.labels=false to slim towards MODEL itself."
        )
    return "MODEL gives features and no classes: labels are not looked at." if given and not own else ""


def space_around(arch: Arch, config: AroundConfig, axes: tuple[str, ...], name: str) -> AroundSpace:
    """The Space of all that may become of the network: `config`'s options, finer by default, on `axes` alone.

    Raises:
        UserError: options that leave nothing to choose.
    """
    multiple = config.multiple or AroundSpace.multiple
    options: dict[str, Any] = {
        "heads": (config.heads or EIGHTHS) if "heads" in axes else (1.0,),
        "hidden": (config.hidden or EIGHTHS) if "hidden" in axes else (1.0,),
        "embed_dim": (config.embed_dim or WIDTHS) if "embed_dim" in axes else (1.0,),
    }
    narrowed = [block.head_dim for block in arch.blocks if narrows_heads(arch, block)]
    options["head_dim"] = (1.0,)
    if "heads" in axes and any(len(options_of(EIGHTHS, number, multiple)) > 1 for number in narrowed):
        shares = config.head_dim or EIGHTHS
        options["head_dim"] = tuple(share for share in shares if 2 * share * min(narrowed) >= multiple)
    there = [block.num_heads for block in arch.blocks], [block.mlp_hidden for block in arch.blocks]
    for axis, numbers, unit in zip(("heads", "hidden"), there, (1, multiple), strict=True):
        least = min(numbers)
        options[axis] = tuple(share for share in options[axis] if 2 * share * least >= unit)
        if getattr(config, axis) is None and all(
            len(options_of(options[axis], n, unit)) == 1 for n in numbers
        ):
            options[axis] = (1.0,)  # such as blocks of one head
    if "blocks" not in axes:
        options["blocks"] = ()
    elif config.blocks is not None:
        options["blocks"] = config.blocks
    else:
        # Tokens leave behind a block of the last stage, which needs one that stays.
        stays = {0, arch.depth - len(arch.stages[-1].blocks)} if "tokens" in axes else {0}
        options["blocks"] = tuple(n for n in range(arch.depth) if n not in stays)
    if "tokens" in axes:
        options |= {
            "keep": config.keep or KEEP,
            "keep_places": config.keep_places,
            "selector": config.selector or "attention",
        }
    options = {key: value for key, value in options.items() if value is not None}
    return around(arch, multiple=multiple, name=f"around_{name}", **options)


class SlimImages(RunImages):
    """A slim run's images: as the network takes them, and named by its classes.

    Args:
        given: images that are open already, whose config is the run's.
    """

    def __init__(self, run: Run, work: Work, model: Model, given: Data | None = None) -> None:
        assert run.slim is not None
        super().__init__(images_for(run.data, model, run.slim), work)
        self.model, self._given = model, given

    def open(self) -> Data:
        return super().open() if self._given is None else self._given.formed(self.config)

    @property
    def has_labels(self) -> bool:
        """Whether the labels are of the network's classes."""
        return has_one_class(self.data.train.targets) and self.data.num_classes == self.model.num_classes

    @property
    def about(self) -> dict[str, Any]:
        names = self.data.class_names if self.has_labels else self.model.pretrained_cfg.get("label_names")
        named = names if names and len(names) == self.model.num_classes else None
        return {**super().about, "class_names": named}


def calibration(images: RunImages, number: int) -> Any:
    """`number` train images, the same at every look: what activations are taken from."""
    train = images.data.train
    order = torch.randperm(len(train), generator=images.work.generator("calibration"))
    return train.subset(sorted(order[:number].tolist()))
