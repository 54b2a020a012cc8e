"""retrain an Arch that is asked for by name, in the run's own way, into models/<role>/ beside the chosen one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.model.named import ArchFile, Named, find_arch
from vitnas.records import Result
from vitnas.stages.models import Models
from vitnas.stages.run import BASELINES
from vitnas.train import TrainConfig

RESERVED = ("chosen", "without_teacher", "soft_labels", *BASELINES)


def retrain(
    models: Models, arch: Arch | str, role: str | None = None, train: TrainConfig | None = None
) -> Path:
    """Train `arch` from scratch, as the run trains its own models; returns its folder.

    It continues where it stopped, and does nothing when the result is there. A model that is trained before the
    final table is made gets a row in it.

    Args:
        arch: an Arch, or words for one: a published name, a ViTAS code, a JSON file or a folder that has one.
        role: its name in the run; by default its published name, or what its file calls it.
        train: how (`Run.anew`); by default the run's `retrain.train`.

    Raises:
        UserError: no such Arch, one that is for other images or classes, or a role that is taken or no name.
    """
    named = Named(arch.id, arch, is_file=True) if isinstance(arch, Arch) else find_arch(arch)
    role = role or named.name
    if role in RESERVED or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", role):
        raise UserError(
            f"role is {role!r}; it must be a word of letters, digits, '.', '_' and '-', and none of "
            f"{', '.join(RESERVED)}, which the run trains by itself. Use role=mine."
        )
    data, heads = models.images.data, models.heads
    fitted = named.fitted(image_size=data.image_size, in_chans=data.in_chans, num_classes=data.num_classes)
    # Heads that the task does not train would stay random, and a distillation token's speaks in every answer.
    fitted = replace(fitted, patch_head="patch_head" in heads, distill_token="distill_token" in heads)
    folder, work = models.folder(role), models.work
    work.engine.wait()
    if _is_taken(folder, fitted):
        raise UserError(
            f"role {role!r} is taken: {folder} is of another model. Give another role=NAME, or delete that folder."
        )
    # Before the training too, so that two Archs never mix under one name.
    work.once(ArchFile.path(folder), lambda: ArchFile(fitted).write(folder))
    if not Result.exists(folder):
        stage = f"retrain/{role}"
        model = models.fresh(fitted, stage)
        models.train_role(role, model, train or models.config.train, stage, start="scratch", asked=named.name)
    return folder


def _is_taken(folder: Path, arch: Arch) -> bool:
    """Something else than `arch`, asked for by name, is there."""
    if Result.exists(folder) and Result.read(folder).asked is None:
        return True
    return ArchFile.exists(folder) and ArchFile.read(folder).arch != arch
