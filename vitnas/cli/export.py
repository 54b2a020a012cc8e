"""`vitnas export MODEL`: any trained network as files that run without vitnas; a model of a run is held against its
run's images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from torch import Tensor, nn

from vitnas.cli.fields import open_run
from vitnas.cli.options import of_data, options, parsed, split
from vitnas.data import DataConfig, EvalBatches, Images
from vitnas.errors import UserError, nearest
from vitnas.exporting.describe import form_of, names_of
from vitnas.exporting.networks import load_network
from vitnas.exporting.precision import Format, Judged
from vitnas.measure.convert import input_shape, random_images
from vitnas.predicting.images import labelled
from vitnas.records import ExportRecord
from vitnas.reporting.cards import write_file_card
from vitnas.stages.claim import opened
from vitnas.stages.results import export_files, export_role
from vitnas.stages.run import ExportConfig
from vitnas.train.progress import Silent

USAGE = (
    "`vitnas export` takes a run folder or a model (RUN@ROLE, a folder of a saved one, a timm name, NAME@FILE), as in "
    "`vitnas export runs/mine@chosen formats=[onnx_int8]`; formats, opset, folder and data.dataset=IMAGES may follow."
)
SOME = 64  # images that a file is held against


@dataclass(frozen=True)
class ExportOptions:
    """A model, in which formats, and where to; which of the images of `data.dataset` it is held against."""

    model: str
    formats: tuple[Format, ...] | None = None
    opset: int | None = None
    folder: Path | None = None
    split: str = "train"


@dataclass(frozen=True)
class Loose:
    """Images that a network of no run is held against: those of a dataset, or noise."""

    root: Path
    network: nn.Module
    given: Images | None

    def some(self) -> Tensor:
        if self.given is None:
            return random_images((8, *input_shape(self.network)))
        return next(iter(EvalBatches(self.given, batch_size=SOME)))[0]

    @cached_property
    def judged(self) -> Judged:
        if self.given is None:
            raise UserError(
                "files of 16 and 8 bits are made and judged by images, and there are none. Add data.dataset=IMAGES."
            )
        return Judged(list(EvalBatches(self.given, batch_size=SOME)), has_labels=True)

    @property
    def about(self) -> dict[str, Any]:
        return {"class_names": None, "data_config": None}  # as the network says itself


def export_one(words: list[str], console: Console) -> None:
    """The files of one model."""
    own, texts = split(ExportOptions, words)
    texts = of_data(texts)
    for name in texts:
        if not name.startswith("data."):
            raise UserError(
                f"{USAGE} There is no field {name!r}.{nearest(name, ('formats', 'opset', 'folder'))}"
            )
    asked = options(ExportOptions, own, USAGE)
    if asked.formats == ():
        raise UserError(f"formats is []; it names at least one of {', '.join(get_args(Format))}. Use [onnx].")
    run, _, role = asked.model.partition("@")
    if role and (Path(run) / "run.yaml").exists():
        if texts or asked.folder:
            raise UserError(
                f"{asked.model} is held against its run's own images, into its run's folder; data fields and folder "
                "are for other models. Leave them out."
            )
        made, where = _of_run(Path(run), role, asked)
    else:
        made, where = _of_any(asked, texts)
    for file in made.files.values():
        console.print(f"  {where / file.path}{f': {file.beside}' if file.beside else ''}", markup=False)
    for kind, reason in made.refused.items():
        console.print(f"  {kind} was not written: {reason}", markup=False)


def _of_run(folder: Path, role: str, asked: ExportOptions) -> tuple[ExportRecord, Path]:
    with opened(open_run(folder), folder, Silent()) as context:
        return export_role(context.models, role, _settled(context.run.export, asked)), folder


def _of_any(asked: ExportOptions, texts: Mapping[str, str]) -> tuple[ExportRecord, Path]:
    network = load_network(asked.model, what="MODEL")
    folder = asked.folder or Path(f"runs/export_{Path(asked.model.partition('@')[0]).name}")
    config = _settled(ExportConfig(formats=("onnx",)), asked)
    made = export_files(Loose(folder, network, _images(asked, network, texts)), network, folder, config)
    made.write(folder)
    write_file_card(folder, network, Path(asked.model).name, f"exported from {Path(asked.model).name}")
    return made, folder


def _settled(config: ExportConfig, asked: ExportOptions) -> ExportConfig:
    formats = asked.formats or config.formats
    return replace(config, formats=formats, opset=config.opset if asked.opset is None else asked.opset)


def _images(asked: ExportOptions, network: nn.Module, texts: Mapping[str, str]) -> Images | None:
    if not texts:
        return None
    config: DataConfig = parsed({"data": DataConfig}, [f"{key}={text}" for key, text in texts.items()])[
        "data"
    ]
    names, form = names_of(network), form_of(network, input_shape(network))
    images, _ = labelled(
        config,
        form,
        own=names,
        num_classes=int(getattr(network, "num_classes", len(names))),
        split=asked.split,
        log=(asked.folder or Path("runs")) / "test_reads.json",
        what=f"export of {asked.model}",
    )
    return images
