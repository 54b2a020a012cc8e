"""Teachers: networks that say what another should learn, with the pixels that they were made for.

A Teacher belongs to the loop while `fit` runs: it lies on the loop's device, is in evaluation mode, runs without
gradient in the loop's precision, and what it learns itself is in the loop's checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional

from vitnas.arch import Arch
from vitnas.data.images import Form
from vitnas.errors import UserError
from vitnas.model.modes import evaluating
from vitnas.model.outputs import output_names, wanted
from vitnas.model.timm_cfg import default_cfg, knows_images
from vitnas.sample.hook import Moment
from vitnas.train.feed import Feed
from vitnas.train.gives import Gives
from vitnas.train.task import At, Task, bare_names, read_views

Momentum = Callable[[int, int], float]  # of (step, steps)


@dataclass(frozen=True)
class Pixels:
    """What images were made to be: mean and std per channel taken off, (height, width), and how many channels they
    have; None where unknown."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    channels: int | None = None

    @classmethod
    def of(cls, network: nn.Module) -> Pixels:
        """What timm's description of `network` says; of the size, what the network was built for or set to.

        A Model fresh from `build` or `extract` has placeholders for mean and std, which count as unknown.
        """
        space = getattr(network, "space", None)
        cfg = getattr(network, "pretrained_cfg", None)
        if space is not None:
            cfg = {**default_cfg(space.largest()), **(cfg or {})}
        if not cfg:
            return cls()
        built = getattr(getattr(network, "patch_embed", None), "img_size", None)
        size, channels = built or cfg["input_size"], channels_of(network)
        mean, std = (
            values if len(values) == channels else (sum(values) / len(values),) * channels
            for values in (tuple(cfg["mean"]), tuple(cfg["std"]))
        )
        known = knows_images(cfg)
        return cls(
            mean if known else None,
            std if known else None,
            (size[-2], size[-1]),
            "bicubic" if cfg.get("interpolation") == "bicubic" else "bilinear",
            channels,
        )

    @classmethod
    def seen(cls, form: Form) -> Pixels:
        """What a student's images are, whatever their size."""
        return cls(tuple(form.mean), tuple(form.std), channels=len(form.mean))


class Teacher:
    """A frozen network.

    Args:
        network: any of ours or timm's; its weights stay as they are.
        arch: which Arch teaches, where it is a Supernet.
        pixels: what images it was made for; read from its `pretrained_cfg` when None. Images of the student that are
            normalised otherwise are renormalised, those of another size are resized.
    """

    def __init__(self, network: nn.Module, *, arch: Arch | None = None, pixels: Pixels | None = None) -> None:
        self.network, self.arch = network, arch
        self.pixels = Pixels.of(network) if pixels is None else pixels
        self._seen = Pixels()

    def see(self, seen: Pixels) -> None:
        """Take note of the student's pixels.

        Raises:
            UserError: images of another number of channels, or a Supernet without an Arch.
        """
        network: Any = self.network
        is_supernet = getattr(network, "space", None) is not None
        if is_supernet != (self.arch is not None):
            raise UserError(
                f"the teacher is a {type(network).__name__} and its arch {self.arch and self.arch.id}; a Supernet "
                f"teaches as one of its Archs, and only a Supernet. {'Give' if is_supernet else 'Leave out'} arch."
            )
        self._seen = seen
        theirs, ours = self.pixels.channels, seen.channels
        if theirs is not None and ours is not None and theirs != ours:
            raise UserError(
                f"the teacher takes images of {theirs} channels, the student's have {ours}; "
                "both must see the same. Use another teacher, or data.in_chans."
            )

    def check(self, want: Sequence[str]) -> None:
        """Refuse what cannot be taught, before any training.

        Raises:
            UserError: outputs that the network has not.
        """
        network: Any = self.network
        wanted(
            bare_names(want),
            output_names(network if self.arch is None else network.subnet(self.arch).skeleton),
        )

    def keep(self, want: Sequence[str], feed: Feed, steps: int, tell: Callable[[str], None]) -> None:
        """Called before the training, for who keeps answers: to `steps` batches of `feed`, of each process.

        Args:
            tell: what to say to the user goes here.
        """

    def answer(self, views: Sequence[Tensor], want: Sequence[str], at: At | None = None) -> dict[str, Tensor]:
        """Its outputs of these names (`train/task.py`), without gradient.

        Args:
            at: which batch it is, where that comes again.
        """
        with torch.no_grad():
            return read_views(self.network, views, want, arch=self.arch, convert=self.convert)

    def convert(self, images_BCHW: Tensor) -> Tensor:
        """The student's images as this network was made for: renormalised, then resized."""
        given = [self._seen.mean, self._seen.std, self.pixels.mean, self.pixels.std]
        known = [_per_channel(v, images_BCHW.dtype, images_BCHW.device) for v in given if v is not None]
        if len(known) == 4 and given[:2] != given[2:]:
            old_mean, old_std, mean, std = known
            images_BCHW = (images_BCHW * old_std + old_mean - mean) / std
        size = self.pixels.size
        if size is not None and tuple(images_BCHW.shape[-2:]) != size:
            images_BCHW = functional.interpolate(
                images_BCHW, size=size, mode=self.pixels.interpolation, antialias=True, align_corners=False
            )
        return images_BCHW

    @contextmanager
    def teaching(self, device: torch.device) -> Iterator[None]:
        """On `device` and in evaluation mode inside; the modes that it had come back."""
        with evaluating(self.network.to(device)):
            yield

    def join(self, task: Task) -> None:
        """Take note of the Task that it teaches, once that has what it trains itself."""

    def before(self, moment: Moment) -> None:
        """Called before every step."""

    def after(self, step: int, steps: int, student: nn.Module) -> None:
        """Called after every step; `step` are done."""

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed training needs; {} for what stays as it is."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""


class AverageTeacher(Teacher):
    """A moving average of the student (Tarvainen and Valpola, arXiv 1703.01780), which sees the student's own pixels.

    Args:
        student: what `fit` trains; a copy of it is where the average begins.
        momentum: share of the average that stays at a step: a number, or a function of (step, steps) such as `cosine`.
    """

    def __init__(
        self, student: nn.Module, momentum: float | Momentum = 0.996, *, arch: Arch | None = None
    ) -> None:
        self._average = ModelEmaV3(student)
        self._momentum = momentum
        super().__init__(self._average.module, arch=arch, pixels=Pixels())

    def after(self, step: int, steps: int, student: nn.Module) -> None:
        momentum = self._momentum
        self._average.decay = momentum(step, steps) if callable(momentum) else momentum
        self._average.update(student)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.network.load_state_dict(dict(tensors))


@cache
def _per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of channels beside images. Kept, as bringing them to a device waits for it, at every step."""
    return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


def cosine(start: float, end: float = 1.0) -> Momentum:
    """From `start` to `end` along half a cosine (DINO, EsViT)."""
    return lambda step, steps: end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def settled_task(
    task: Task,
    network: nn.Module,
    teacher: Teacher | None,
    form: Form | None,
    input_size: Callable[[], tuple[int, int, int]],
) -> Task:
    """The Task between student and teacher; what cannot be had is refused before any training.

    Args:
        form: of the student's images, where it is known; else the network's description says what they are.
        input_size: channels, height and width of an image, where the Task must know what the networks give.

    Raises:
        UserError: outputs that network or teacher have not, a Task that must be taught by nobody, a teacher that
            teaches nothing, or images that it cannot see.
    """
    name = type(task).__name__
    if teacher is None:
        if must := [want for want in task.wants_taught if not want.endswith("?")]:
            raise UserError(
                f"{name} learns from a teacher's {', '.join(must)} and there is none. Pass teacher=Teacher(network) to "
                "fit."
            )
    else:
        teacher.see(Pixels.of(network) if form is None else Pixels.seen(form))
        taught_by = Gives(teacher.network, input_size, arch=teacher.arch, convert=teacher.convert)
        task = task.meet(Gives(network, input_size), taught_by)
        if not task.wants_taught:
            raise UserError(
                f"{name} learns nothing from a teacher. Leave the teacher out, or use another task."
            )
        teacher.join(task)
        teacher.check(task.wants_taught)
    wanted(bare_names(task.wants), output_names(network))
    return task


def channels_of(network: nn.Module) -> int:
    """Channels of the images that `network` takes; timm's description keeps those of the published weights."""
    space, cfg = getattr(network, "space", None), getattr(network, "pretrained_cfg", None) or {}
    if space is not None:
        return int(space.largest().in_chans)
    first = cfg.get("first_conv")
    found = [module for name, module in network.named_modules() if name == first]
    channels = getattr(found[0], "in_channels", None) if found else None
    return int(channels or getattr(network, "in_chans", None) or cfg["input_size"][0])
