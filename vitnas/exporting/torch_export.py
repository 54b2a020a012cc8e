"""torch.export: a `.pt2` file that runs with torch alone, without the Model's code.

`torch.export.load` unpickles the example inputs of a file if there are any. So they are left out of what is
written, and the archive is searched for pickled records before it is read back for the comparison. With that,
files written here hold raw tensors and JSON only. Files from elsewhere are never opened.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitnas.errors import first_line
from vitnas.exporting.describe import PIXELS, TENSORS, describe, form_of, prepared_inside
from vitnas.exporting.pixels import Answering, Ready, choice_of, other_size, pixels_of
from vitnas.exporting.verify import Agreement, ExportError, Run, example_images, traced_images, verify
from vitnas.measure.convert import BATCH_NAME, quiet
from vitnas.model.modes import evaluating
from vitnas.runs import write_with
from vitnas.version import VERSION

SIDES = {1: "height", 2: "width"}


def export_program(
    model: nn.Module,
    path: Path | str,
    images: Tensor | None = None,
    *,
    dynamic_batch: bool = True,
    tolerance: float | None = None,
    class_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    pixels: bool = False,
) -> dict[str, Any]:
    """Write `model` as a `.pt2` file, read it back and compare it with the Model.

    Load it with `torch.export.load(path).module()`. Arguments as in `export_onnx`; what that keeps as
    metadata is the extra file `vitnas.json` of the archive.

    Returns:
        The record: path, bytes, parameter counts, agreement, problems in words.

    Raises:
        ExportError: torch.export cannot take the model, or the file computes something else. A file that was
            at `path` before is untouched.
        UserError: wrong images or class names; `path` cannot be written.
    """
    path, started = Path(path), time.perf_counter()
    shown = Shown.of(model, images, pixels=pixels, class_names=class_names, data_config=data_config)
    # Traced with sides that differ: equal ones would be taken for one.
    traced = traced_images(
        other_size(shown.examples) if pixels else shown.examples, dynamic_batch=dynamic_batch
    )
    axes = {0: BATCH_NAME} if dynamic_batch else {}
    program = trace(shown.network, traced, axes | (SIDES if pixels else {}))
    problems = list(shown.problems)
    with tempfile.TemporaryDirectory(prefix="vitnas-export-") as folder:
        file = Path(folder) / "model.pt2"
        with quiet():
            torch.export.save(program, file, extra_files={"vitnas.json": json.dumps(shown.properties)})
        pickled = pickled_records(file)
        if pickled:
            problems.append(
                f"The file holds pickled records ({', '.join(pickled)}), so it was not read back."
            )
        else:
            with quiet():
                program = torch.export.load(file)
        run = program.module()
        agreement = shown.verify(run, "the torch.export file", tolerance, dynamic_batch=dynamic_batch)
        write_with(path, partial(shutil.copyfile, file))
    record = shown.record(path, model, program, agreement, dynamic_batch=dynamic_batch)
    if not record["params_equal"]:
        problems.append(
            f"The file holds {record['exported_params']} parameters of the Model's {record['params']}; the others are "
            "unused."
        )
    return {
        **record,
        "problems": problems,
        "seconds": round(time.perf_counter() - started, 3),
        "versions": {"torch": str(torch.__version__), "vitnas": VERSION},
    }


@dataclass(frozen=True)
class Shown:
    """A Model as a file of torch's has it: what is traced, images as that takes them, and what the file says of itself.

    `tells` says that it gives numbers, and has no first class.
    """

    network: nn.Module
    examples: Tensor
    properties: dict[str, str]
    real: bool
    pixels: bool
    tells: bool

    @classmethod
    def of(
        cls,
        model: nn.Module,
        images: Tensor | None,
        *,
        pixels: bool,
        class_names: Sequence[str] | None,
        data_config: Mapping[str, Any] | None,
    ) -> Shown:
        """Arguments as in `export_program`."""
        examples, real = example_images(model, images)
        input_size, tells = list(examples.shape[1:]), choice_of(model) == "numbers"
        takes = PIXELS if pixels else TENSORS
        properties = describe(model, input_size, class_names, data_config, takes=takes)
        network: nn.Module = Answering(model) if tells else model
        if pixels:
            form = prepared_inside(form_of(model, input_size, data_config))
            network, examples = Ready(model, form), pixels_of(examples, form)
        return cls(network, examples, properties, real, pixels, tells)

    @property
    def problems(self) -> tuple[str, ...]:
        return () if self.real else ("No images were given, so the comparison used noise.",)

    def verify(self, run: Run, name: str, tolerance: float | None, *, dynamic_batch: bool) -> Agreement:
        """Compare a file with the Model, on images of other sides too where it takes any.

        Raises:
            ExportError: it computes something else.
        """
        agreement, *_ = [
            verify(
                self.network,
                run,
                some,
                name=name,
                real_images=self.real,
                tolerance=tolerance,
                dynamic_batch=dynamic_batch,
            )
            for some in (self.examples, *([other_size(self.examples)] if self.pixels else []))
        ]
        return replace(agreement, top1_agreement=None) if self.tells else agreement

    def record(
        self,
        path: Path,
        model: nn.Module,
        program: torch.export.ExportedProgram,
        agreement: Agreement,
        *,
        dynamic_batch: bool,
    ) -> dict[str, Any]:
        """What is told of a file in `path`, whatever runs it."""
        params, exported = (sum(part.numel() for part in each.parameters()) for each in (model, program))
        return {
            "path": str(path),
            "bytes": path.stat().st_size,
            "input": "uint8" if self.pixels else "float",
            "dynamic_batch": dynamic_batch,
            "params": params,
            "exported_params": exported,
            "params_equal": exported == params,
            **agreement.to_json(),
        }


def pickled_records(file: Path) -> list[str]:
    """Names of the records of a `.pt2` archive that reading it would unpickle; nothing is unpickled to find out."""
    found = []
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if "/sample_inputs/" in name and archive.getinfo(name).file_size:
                found.append(name)
            elif name.endswith("_config.json") and '"use_pickle": true' in archive.read(name).decode():
                found.append(name)
    return found


def trace(
    model: nn.Module, images: Tensor, axes: Mapping[int, str], *, longest: int | None = None
) -> torch.export.ExportedProgram:
    """`model`, evaluating, as a program for images like these, whose `axes` may have other lengths, up to `longest`.

    Raises:
        ExportError: torch.export cannot take it.
    """
    shapes = ({axis: torch.export.Dim(name, max=longest) for axis, name in axes.items()},) if axes else None
    try:
        with evaluating(model), quiet(), torch.no_grad():
            program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    except Exception as error:
        raise ExportError(
            f"torch.export cannot take this {type(model).__name__}: {first_line(error)}."
        ) from error
    program.example_inputs = None  # or else the file would hold them as a pickle
    return program
