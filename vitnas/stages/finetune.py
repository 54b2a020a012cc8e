"""finetune: go on with a trained model at another resolution (positions resampled), into models/<role>-<size>px/."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from vitnas.counting import count
from vitnas.data import open_data
from vitnas.errors import UserError
from vitnas.grids import ImageSize, size_text
from vitnas.model import Model
from vitnas.records import Result
from vitnas.sample import Fixed
from vitnas.stages.context import Context
from vitnas.stages.models import load_model, save_model
from vitnas.stages.tasks import make_task
from vitnas.train import Monitor, evaluate, fit


def finetune(context: Context, role: str, image_size: ImageSize) -> Path:
    """Train models/<role> further on images of `image_size` pixels, by the run's `retrain.train`.

    Does nothing when the result is there. Its result.json has the accuracy on the holdout split before and behind.

    Raises:
        UserError: no such trained model, or a size that its patches and reductions do not divide.
    """
    if not Result.exists(context.folder / "models" / role):
        raise UserError(
            f"{context.folder} has no trained model {role!r}; `vitnas retrain` makes chosen and the baselines. Run "
            "that first, or name another."
        )
    name = f"{role}-{size_text(image_size).replace(' ', '')}px"
    folder = context.folder / "models" / name
    context.engine.wait()
    if Result.exists(folder):
        return folder
    model = load_model(context, role)
    model.set_input_size(img_size=image_size)
    run, larger = context.run, _resized(context, image_size)
    config, data = run.retrain.train, larger.data
    before = evaluate(model.to(context.engine.device), larger.holdout)
    task, teacher = make_task(
        run, augment=larger.augment, num_classes=data.num_classes, grid=model.arch.grids[-1]
    )
    fitted = fit(
        model,
        task,
        Fixed(),
        larger.train_batches(f"finetune/{name}"),
        config=config,
        teacher=teacher,
        augment=larger.augment,
        num_classes=data.num_classes,
        seed=run.seed,
        engine=context.engine,
        folder=context.folder,
        stage=f"finetune/{name}",
        monitor=Monitor((("model", None),), larger.holdout),
        progress=context.progress,
    )
    network = fitted.network
    assert isinstance(network, Model)
    score, cost = evaluate(network.eval(), larger.holdout), count(network.arch)
    result = Result(
        role=name,
        arch_id=network.arch.id,
        macs=cost.macs,
        params=cost.params,
        memory_bytes=cost.memory_bytes,
        holdout_accuracy=score.accuracy,
        n_holdout=score.n,
        epochs=config.epochs,
        seconds=fitted.seconds,
        start=role,
        train=asdict(config),
        image_size=image_size,
        holdout_accuracy_before=before.accuracy,
    )
    context.once(Result.path(folder), lambda: save_model(larger, network, folder, result))
    return folder


def _resized(context: Context, image_size: ImageSize) -> Context:
    """The same run with images of another size."""
    data = replace(context.run.data, image_size=image_size)
    resized = Context(replace(context.run, data=data), context.folder, context.progress)
    resized.engine = context.engine
    assert context.data  # checked to be the run's own images
    resized.data = open_data(data)
    return resized
