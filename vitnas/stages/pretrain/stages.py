"""The stages of a pretraining: train, export, evaluate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from vitnas.counting import count
from vitnas.data import Readings
from vitnas.exporting import save_timm
from vitnas.extraction import extract
from vitnas.model import Model
from vitnas.model.named import ArchFile
from vitnas.probing import Look, Pretrained, PretrainForecast, Probed, looks_of, probe
from vitnas.records import ExportRecord
from vitnas.reporting import tell
from vitnas.runs import writing
from vitnas.stages.pretrain.context import PretrainContext
from vitnas.stages.pretrain.forecast import settled, views
from vitnas.stages.pretrain.watch import Watch, told
from vitnas.stages.results import export_files
from vitnas.stages.searching import WEIGHTS
from vitnas.stages.work import save_weights
from vitnas.supernet import Supernet
from vitnas.train import EsViTConfig, TrainConfig, fit, metrics


def pretrain(context: PretrainContext) -> None:
    """models/chosen/ and pretrained.json: the averaged network; of a Supernet also supernet.safetensors."""
    run, work, data = context.run, context.work, context.images.data
    planned = PretrainForecast.read(context.folder)
    train, esvit = settled(context, planned)
    student = context.student()
    loader = views(context, esvit, student, planned.batch_size)
    teacher = esvit.teacher(student)
    watch = Watch(
        teacher,
        data.train,
        data.holdout,
        out_dim=esvit.out_dim,
        looks=context.pretrain.looks,
        advice=advice(esvit, train) if context.pretrain.alarm else None,
        note=work.progress.note,
    )
    fitted = fit(
        student,
        esvit.task(train.weight_decay),
        context.draws,
        loader,
        config=train,
        teacher=teacher,
        seed=run.seed,
        engine=work.engine,
        folder=work.folder,
        stage="pretrain",
        hooks=[watch],
        progress=work.progress,
    )
    last = watch.look(watch.vitals(fitted.steps))
    work.progress.note(f"at the end: {told(last)}")
    work.once(
        Pretrained.path(context.folder),
        lambda: _write(context, teacher.network, planned, last, fitted.seconds),
    )


def _write(
    context: PretrainContext, network: nn.Module, planned: PretrainForecast, last: Look, seconds: float
) -> None:
    folder, model = context.models.folder("chosen"), network
    if isinstance(network, Supernet):
        save_weights(network, context.folder / WEIGHTS)
        model = extract(network, network.space.largest())
    made: Any = model.cpu().eval()
    made.requires_grad_(True)
    with writing(folder):
        save_timm(made, folder, **context.images.about)
    macs = None
    if isinstance(made, Model):
        macs = count(made.arch).macs
        ArchFile(made.arch).write(folder)
    Pretrained(
        model=context.pretrain.model,
        network=made.arch.describe() if isinstance(made, Model) else type(made).__name__,
        params=sum(parameter.numel() for parameter in made.parameters()),
        macs=macs,
        image_size=context.images.data.image_size,
        width=int(made.num_features),
        images=planned.images,
        epochs=planned.epochs,
        steps=planned.steps,
        seconds=seconds,
        first=next((look for _, look in looks_of(metrics.read_lines(context.folder))), None),
        last=last,
    ).write(context.folder)


def advice(esvit: EsViTConfig, train: TrainConfig) -> Callable[[str], str]:
    """What to change in a training that has died, from how it was set: the likeliest reason first."""
    warm, hot = sorted((esvit.warmup_teacher_temp, esvit.teacher_temp))
    if hot >= esvit.student_temp:
        remedy = (
            f"pretrain.esvit.teacher_temp is {hot:g} and student_temp {esvit.student_temp:g}; the teacher must be the "
            "surer of both. Use 0.02 for it"
        )
    elif esvit.center_momentum >= 0.999:
        remedy = (
            f"pretrain.esvit.center_momentum is {esvit.center_momentum:g}, so what the teacher says of all images is "
            "never taken off. Use 0.9"
        )
    elif warm < 0.005:
        remedy = f"pretrain.esvit.teacher_temp is {warm:g}, at which every answer is one prototype. Use 0.02"
    else:
        remedy = (
            f"Lower supernet.lr ({train.lr:g}) to a tenth, or lower pretrain.esvit.teacher_temp ({hot:g})"
        )
    return lambda how: (
        f"the pretraining has collapsed: {how}; more steps do not bring it back. {remedy}, in another folder=PATH."
    )


def export(context: PretrainContext) -> None:
    """export/: the network that gives features, in files that were held against it."""
    target = context.folder / "export"

    def make() -> None:
        made = export_files(context.images, context.result(), target, context.run.export)
        made.write(target)

    context.work.once(ExportRecord.path(target), make)


def judge(context: PretrainContext) -> None:
    """probe.json, where there are labels: the test split, read once; and report.html."""
    folder = context.folder
    if context.images.has_labels:
        context.work.once(Probed.path(folder), lambda: _probe(context).write(folder))
    context.engine.from_first(lambda: tell(folder))  # also over one from before the end


def is_judged(folder: Path) -> bool:
    """Whether a run whose page is there has been probed where it has labels: pages of unfinished runs are made, too."""
    return Probed.exists(folder) or (Pretrained.exists(folder) and Pretrained.read(folder).last.knn is None)


def _probe(context: PretrainContext) -> Probed:
    return probe(
        context.result(),
        context.images.data,
        name=str(context.models.folder("chosen")),
        log=Readings.path(context.folder),
        engine=context.engine,
        progress=context.work.progress,
    )
