"""Export of many files: ONNX by tracing first, which takes a tenth of the time; verified like any other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitnas.exporting import ExportError, export_model, export_onnx


def export_quickly(
    model: nn.Module,
    path: Path | str,
    images: Tensor | None = None,
    *,
    class_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    pixels: bool = False,
    opset: int | None = None,
) -> dict[str, Any]:
    """As `export_model`, and by its way where tracing cannot take the model or writes something else."""
    about: dict[str, Any] = {"class_names": class_names, "data_config": data_config, "pixels": pixels}
    if opset is not None:
        about["opset"] = opset
    if Path(path).suffix == ".onnx":
        try:
            return export_onnx(model, path, images, exporter="legacy", **about)
        except ExportError:
            pass
    return export_model(model, path, images, **about)
