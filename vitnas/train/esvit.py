"""Learning from images without labels: student and averaged teacher, as EsViT and DINO do.

Sources: EsViT (arXiv 2106.09785), DINO (arXiv 2104.14294). `EsViTConfig` makes what `fit` needs:

    config = EsViTConfig(local_crops_number=4)
    loader = config.views(images, network, batch_size=64, seed=0)
    fit(network, config.task(), Fixed(), loader, config=train, teacher=config.teacher(network))

Shapes: B images, K prototypes, P regions, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vitnas.arch import Arch
from vitnas.data.batches import TrainBatches
from vitnas.data.crops import Crops
from vitnas.data.images import Images
from vitnas.errors import UserError, first_line
from vitnas.grids import ImageSize, as_image_size
from vitnas.model.sizes import local_size, take_other_sizes
from vitnas.sample.hook import Moment
from vitnas.train.engine import sum_over_processes
from vitnas.train.losses.esvit import EsViT
from vitnas.train.projection_heads import ProjectionHead
from vitnas.train.task import At, Task, read_views
from vitnas.train.teacher import AverageTeacher, cosine

TAUGHT_CROPS = 2  # the global ones


@dataclass(frozen=True, kw_only=True)
class EsViTConfig:
    """Self-distillation of views, and with `region` of regions: crops, heads, temperatures, centre, averaging.

    The names are DINO's. Defaults are for some thousand small images; the paper's are out_dim=65536, hidden_dim=2048,
    bottleneck_dim=256, local_crops_number=8, teacher_temp=0.07 and warmup_teacher_temp=0.04 with a warm-up of 30 of 300
    epochs, norm_last_layer=False. What two crops say alike of an image grows where the crops agree by more than
    teacher_temp / student_temp, and fades where by less: features of small crops at the beginning agree by less than
    that of the paper (LOG.md).

    `region_from` is the epoch at which regions begin, for a run in stages. `local_crops_size` is 96/224 of the image in
    whole patches by default. Crop scales are shares of the image's area. `momentum_teacher` rises to 1 and weight decay
    to `weight_decay_end` (null: it stays) along half a cosine. `freeze_last_layer` epochs the last layers of the heads
    stay as they began. With `mixup` the student's crops show two images each, as in the authors' code.
    """

    region: bool = True
    region_from: float = 0.0
    out_dim: int = 1024
    hidden_dim: int = 512
    bottleneck_dim: int = 128
    nlayers: int = 3
    use_bn: bool = False
    norm_last_layer: bool = True
    freeze_last_layer: float = 1.0
    student_temp: float = 0.1
    teacher_temp: float = 0.02
    warmup_teacher_temp: float = 0.01
    warmup_teacher_temp_epochs: int = 10
    center_momentum: float = 0.9
    momentum_teacher: float = 0.996
    weight_decay_end: float | None = 0.4
    mixup: float = 0.0
    local_crops_number: int = 4
    local_crops_size: int | None = None
    global_crops_scale: tuple[float, float] = (0.4, 1.0)
    local_crops_scale: tuple[float, float] = (0.1, 0.4)

    def __post_init__(self) -> None:
        for name in ("student_temp", "teacher_temp", "warmup_teacher_temp"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(
                    f"{name} is {getattr(self, name)}; a temperature is above 0 and at most 1. Use the default."
                )
        for name in ("center_momentum", "momentum_teacher"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"{name} is {getattr(self, name)}; it is the share that stays at a step, from 0 to 1. Use the "
                    "default."
                )
        least = {"out_dim": 2, "hidden_dim": 1, "bottleneck_dim": 1, "nlayers": 1, "local_crops_number": 0}
        least |= {"warmup_teacher_temp_epochs": 0, "freeze_last_layer": 0, "region_from": 0, "mixup": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {low}. Raise it.")
        if self.weight_decay_end is not None and self.weight_decay_end <= 0:
            raise UserError(
                f"weight_decay_end is {self.weight_decay_end}; it must be above 0. Use null to leave weight decay as "
                "it is."
            )
        self._crops(None)

    @property
    def crops_number(self) -> int:
        """Crops of an image."""
        return TAUGHT_CROPS + self.local_crops_number

    def task(self, weight_decay: float | None = None) -> EsViT:
        """What is learned.

        Args:
            weight_decay: of the training, which rises from it to `weight_decay_end`; None leaves it as it is.
        """
        end, rises = self.weight_decay_end, None
        if weight_decay and end is not None:
            rises = cosine(weight_decay, end)
        return EsViT(
            crops=self.crops_number,
            taught_crops=TAUGHT_CROPS,
            head=self.head,
            student_temp=self.student_temp,
            region_from=self.region_from if self.region else None,
            freeze_last_layer=self.freeze_last_layer,
            weight_decay=rises,
            mixup=self.mixup,
        )

    def head(self, in_dim: int) -> ProjectionHead:
        """A projection head for features of that width."""
        return ProjectionHead(
            in_dim,
            self.out_dim,
            hidden_dim=self.hidden_dim,
            bottleneck_dim=self.bottleneck_dim,
            nlayers=self.nlayers,
            use_bn=self.use_bn,
            norm_last_layer=self.norm_last_layer,
        )

    def teacher(
        self, student: nn.Module, *, arch: Arch | None = None, start: Mapping[str, Tensor] | None = None
    ) -> SelfTeacher:
        """The average of `student`, heads included.

        Args:
            arch: which Arch teaches, of a Supernet; the largest by default.
            start: `handover()` of an earlier training, to go on from.
        """
        space: Any = getattr(student, "space", None)
        if arch is None and space is not None:
            arch = space.largest()
        return SelfTeacher(student, self, arch=arch, start=start)

    def teacher_temp_at(self, epoch: float) -> float:
        """In an epoch: rising in even steps, one per epoch, from the first epoch to the last of the warm-up."""
        last = self.warmup_teacher_temp_epochs - 1
        done = 1.0 if epoch >= last else math.floor(epoch) / last
        return self.warmup_teacher_temp + done * (self.teacher_temp - self.warmup_teacher_temp)

    def views(
        self,
        images: Images,
        network: nn.Module,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> TrainBatches:
        """Batches of crops of `images`, of sizes that `network` takes, which it is told to take from now on.

        Raises:
            UserError: fewer than two images, a crop smaller than a patch, or one that the network cannot take.
        """
        share = len(images) // world
        if share < batch_size:
            raise UserError(
                f"the batches hold {batch_size} images and there are {len(images)} {images.split} images"
                f"{f' for {world} processes' if world > 1 else ''}; centres are means over full batches. Use a "
                f"batch_size of at most {share}, or more images."
                if share > 1
                else f"there are {len(images)} {images.split} images for {world} processes; learning from their "
                "differences takes at least two each. Use more images."
            )
        whole = images.form.image_size
        size: ImageSize = (
            local_size(network, whole)
            if self.local_crops_size is None
            else as_image_size("local_crops_size", self.local_crops_size)
        )
        crops = self._crops(size)
        if self.local_crops_number:
            take_other_sizes(network, images.form.input_size, size)
        return TrainBatches(
            images, crops, batch_size=batch_size, seed=seed, rank=rank, world=world, workers=workers
        )

    def _crops(self, size: ImageSize | None) -> Crops:
        return Crops(
            local_number=self.local_crops_number,
            local_size=size or 1,
            global_scale=self.global_crops_scale,
            local_scale=self.local_crops_scale,
        )


class SelfTeacher(AverageTeacher):
    """The average of the student and of its heads. It gives probabilities: logits, centred, by its temperature.

    The centres are moving averages of the logits of all processes. A batch is taught with the centres of before it.
    """

    def __init__(
        self,
        student: nn.Module,
        config: EsViTConfig,
        *,
        arch: Arch | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        rises = cosine(config.momentum_teacher)
        super().__init__(student, lambda step, steps: rises(step - 1, steps), arch=arch)
        self._config, self._start = config, start
        self._temperature = config.teacher_temp_at(0)
        self._device = torch.device("cpu")
        self._centres: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}  # of logits since the centres moved, and how many
        self._own: nn.Module | None = None

    @contextmanager
    def teaching(self, device: torch.device) -> Iterator[None]:
        self._device = device
        with super().teaching(device):
            yield

    def join(self, task: Task) -> None:
        if not isinstance(task, EsViT) or task.own is None:
            raise UserError(
                f"{type(task).__name__} is not what this teacher teaches. Use the task of the same EsViTConfig."
            )
        self._own, self._task = task.own.to(self._device), task
        self._heads = ModelEmaV3(task.own)
        if self._start is not None:
            self._go_on(task.own, self._start)

    def _go_on(self, own: nn.ModuleDict, start: Mapping[str, Tensor]) -> None:
        """Take over what an earlier training had; heads that it had not are new."""
        try:
            super().restore(_part(start, "network"))
            for where, heads in (("own", own), ("heads", self._heads.module)):
                for part, head in heads.items():
                    if state := _part(start, f"{where}.{part}"):
                        head.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"the earlier training was of another network or other heads ({first_line(error)}). Use the same, or "
                "leave start out."
            ) from error
        self._centres = {
            part: c.to(self._device) for part, c in _part(start, "centre").items() if part in own
        }

    def check(self, want: Sequence[str]) -> None:
        """All that it gives follows from the network's features, which the student has too."""

    def before(self, moment: Moment) -> None:
        self._temperature = self._config.teacher_temp_at(moment.epoch)

    def answer(self, views: Sequence[Tensor], want: Sequence[str], at: At | None = None) -> dict[str, Tensor]:
        has_regions = any(name.endswith(".region") for name in want)
        kinds = ("pooled", "tokens") if has_regions else ("pooled",)
        crops = range(TAUGHT_CROPS)
        names = [f"views.{crop}.{kind}" for crop in crops for kind in kinds]
        with torch.no_grad():
            found = read_views(self.network, views, names, arch=self.arch)
            pooled = [found[f"views.{crop}.pooled"] for crop in crops]
            said = self._say("view", torch.cat(pooled)).chunk(len(crops))
            told = {f"views.{crop}.view": said[crop] for crop in crops}
            if has_regions:
                patches = [self._task.patches(found[f"views.{crop}.tokens"]) for crop in crops]
                said = self._say("region", torch.cat(patches).flatten(0, 1)).chunk(len(crops))
                for crop in crops:
                    told[f"views.{crop}.patches"] = patches[crop]
                    told[f"views.{crop}.region"] = said[crop].unflatten(0, patches[crop].shape[:2])
            told["center_norm"] = self.centre("view").norm().expand(len(pooled[0]))
        return told

    def _say(self, part: str, features_RD: Tensor) -> Tensor:
        """(R, K) probabilities; the logits are noted for the centre."""
        logits_RK = self._heads.module[part](features_RD).float()
        noted = torch.cat([logits_RK.sum(0), logits_RK.new_full((1,), len(logits_RK))])
        self._sums[part] = self._sums[part] + noted if part in self._sums else noted
        return self._sharpened(part, logits_RK)

    def _sharpened(self, part: str, logits_RK: Tensor) -> Tensor:
        """Probabilities; the logits are used up."""
        return logits_RK.sub_(self.centre(part)).div_(self._temperature).softmax(-1)

    @torch.no_grad()
    def probabilities(self, features_RD: Tensor, part: str = "view") -> Tensor:
        """(R, K) what it says now of (R, D) features of its network; nothing is noted."""
        return self._sharpened(part, self.logits(features_RD, part))

    @torch.no_grad()
    def logits(self, features_RD: Tensor, part: str = "view") -> Tensor:
        """(R, K) the same before centre and temperature."""
        logits_RK: Tensor = self._heads.module[part](features_RD.to(self._device)).float()
        return logits_RK

    def centre(self, part: str = "view") -> Tensor:
        """(K,) of the logits for views, or for regions."""
        if part not in self._centres:
            self._centres[part] = torch.zeros(self._config.out_dim, device=self._device)
        return self._centres[part]

    def after(self, step: int, steps: int, student: nn.Module) -> None:
        super().after(step, steps, student)
        self._heads.decay = self._average.decay
        self._heads.update(self._own)
        if not self._sums:
            return
        stays = self._config.center_momentum
        summed = sum_over_processes(torch.stack([*self._sums.values()]))
        for part, sums in zip(self._sums, summed, strict=True):
            mean_K = sums[:-1] / sums[-1]
            self._centres[part] = self.centre(part) * stays + mean_K * (1 - stays)
        self._sums = {}

    def tensors(self) -> dict[str, Tensor]:
        parts = {
            "network": super().tensors(),
            "heads": self._heads.module.state_dict(),
            "centre": self._centres,
        }
        return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        super().restore(_part(tensors, "network"))
        self._heads.module.load_state_dict(_part(tensors, "heads"))
        centres = _part(tensors, "centre")
        self._centres = {part: centre.to(self._device) for part, centre in centres.items()}

    def handover(self) -> dict[str, Tensor]:
        """All that another training goes on from, besides the student: `tensors`, and the student's heads."""
        own = {} if self._own is None else self._own.state_dict()
        return {**self.tensors(), **{f"own.{name}": tensor for name, tensor in own.items()}}


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Those below `name`, without it."""
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
