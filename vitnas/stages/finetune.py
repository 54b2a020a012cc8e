"""finetune: go on with a trained model at another resolution (positions resampled), into models/<role>-<size>px/."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.grids import ImageSize, size_text
from vitnas.model.blocks import resized
from vitnas.records import Result
from vitnas.stages.models import Models
from vitnas.stages.prepare import check_fits
from vitnas.stages.run import changes, in_words
from vitnas.train import TrainConfig, evaluate


def finetune(models: Models, role: str, image_size: ImageSize, config: TrainConfig) -> Path:
    """Train models/<role> further on images of `image_size` pixels; returns its folder.

    Does nothing when the same was done before. Its result.json has the accuracy on the holdout split before and behind.

    Raises:
        UserError: no such trained model, a size that its patches and reductions do not divide, or one that was trained
            there in another way.
    """
    if not Result.exists(models.folder(role)):
        raise UserError(
            f"{models.work.folder} has no trained model {role!r}; `vitnas retrain` makes chosen and the baselines. Run "
            "that first, or name another."
        )
    name = f"{role}-{size_text(image_size).replace(' ', '')}px"
    folder = models.folder(name)
    models.work.engine.wait()
    model = models.load(role)
    arch = resized(model.arch, image_size, model.arch.patch_size)
    check_fits(models.work.engine, config, count(arch), arch.seen_size, 2)
    model.set_input_size(img_size=image_size)
    if Result.exists(folder):
        known = Result.read(folder)
        changed = changes({"arch": known.arch_id, **known.train}, {"arch": model.arch.id, **asdict(config)})
        if changed:
            raise UserError(
                f"{folder} was trained in another way ({in_words(changed)}). Repeat its command, or delete that folder "
                "to train anew."
            )
        return folder
    larger = replace(models, images=models.images.resized(image_size))
    before = evaluate(model.to(models.work.engine.device), larger.images.holdout)
    larger.train_role(
        name,
        model,
        config,
        f"finetune/{name}",
        start=role,
        image_size=image_size,
        holdout_accuracy_before=before.accuracy,
    )
    return folder
