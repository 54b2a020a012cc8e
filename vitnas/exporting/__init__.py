"""Export: a Model as a file that others run, verified against the Model before it takes its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitnas.errors import UserError
from vitnas.exporting.executorch import export_executorch
from vitnas.exporting.onnx import export_onnx, unsupported
from vitnas.exporting.timm_dir import load_timm, save_timm
from vitnas.exporting.torch_export import export_program
from vitnas.exporting.verify import Agreement, ExportError, compare, verify

__all__ = [
    "Agreement",
    "ExportError",
    "compare",
    "export_executorch",
    "export_model",
    "export_onnx",
    "export_program",
    "load_timm",
    "save_timm",
    "unsupported",
    "verify",
]


def export_model(
    model: nn.Module,
    path: Path | str,
    images: Tensor | None = None,
    *,
    class_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
    pixels: bool = False,
    opset: int | None = None,
) -> dict[str, Any]:
    """Write `model` to `path` in the format that its suffix names, and verify what was written.

    Args:
        path: `*.onnx` (ONNX Runtime and others), `*.pt2` (torch alone), `*.pte` (ExecuTorch), or a folder (timm).
        images: preprocessed (B, C, H, W) images to compare on; noise if None. A folder needs none: its
            tensors are compared bit for bit.
        class_names: names of the classes in order, written into the file.
        data_config: `mean`, `std`, `interpolation`, `crop_pct` of the training images, where they differ from
            the model's `pretrained_cfg`, which has those of the images that `fit` trained it on. What is not known
            is not written.
        tolerance: allowed difference of the logits.
        pixels: the file takes uint8 images (B, H, W, C) of any height and width and gives probabilities (see
            `export_onnx`; `.pte` files take one at a time, of bounded sides); not of a folder.
        opset: of an ONNX file, 20 by default.

    Returns:
        The record of the export, as JSON values.

    Raises:
        UserError: another suffix, wrong images or class names, `path` cannot be written, or `pixels` where it is not
            known how images are prepared.
        ExportError: the model cannot be exported, or the file computes something else.
        MissingExtra: of a `.pte` file, ExecuTorch is not installed.

    >>> export_model(model, "model.onnx", images)["max_abs_diff"]  # doctest: +SKIP
    """
    path = Path(path)
    about: dict[str, Any] = {"class_names": class_names, "data_config": data_config}
    if opset is not None and path.suffix != ".onnx":
        raise UserError(
            f"opset is {opset} and the path {str(path)!r}; only ONNX files have one. Leave it out."
        )
    if path.suffix == ".onnx":
        about |= {} if opset is None else {"opset": opset}
        return export_onnx(model, path, images, tolerance=tolerance, pixels=pixels, **about)
    if path.suffix == ".pt2":
        return export_program(model, path, images, tolerance=tolerance, pixels=pixels, **about)
    if path.suffix == ".pte":
        return export_executorch(model, path, images, tolerance=tolerance, pixels=pixels, **about)
    if path.suffix and not path.is_dir():
        raise UserError(
            f"export path is {str(path)!r}; it must end in .onnx, .pt2 or .pte, or be a folder without a suffix (for "
            "timm). Rename it."
        )
    return save_timm(model, path, **about)
