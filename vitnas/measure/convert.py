"""A Model as an ONNX file: the bare conversion, shared by the latency meter and by export.

Measuring and exporting use this one function, so the file that a search times is made like the file that is
handed out. Only `vitnas.export` verifies the file.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.measure.onnx_spelling import OnnxSpelling
from vitnas.model.modes import evaluating

Exporter = Literal["dynamo", "legacy"]
INPUT_NAME, OUTPUT_NAME, BATCH_NAME = "input", "logits", "batch"
LEGACY_MAX_OPSET = 20
_NOISY_LOGGERS = ("torch.onnx", "torch.export", "torch._dynamo", "torch.fx", "onnxscript", "onnx_ir")


def convert(
    model: nn.Module,
    path: Path,
    images_BCHW: Tensor,
    *,
    exporter: Exporter = "dynamo",
    opset: int = 20,
    dynamic_batch: bool = True,
) -> None:
    """Write `model` in evaluation mode as one ONNX file with the input `input` and the output `logits`.

    The model's modes and weights are left as they were. Whatever the exporter raises is passed on.

    Args:
        images_BCHW: example images on the model's device. With `dynamic_batch` the file takes any batch size
            (its axis is named `batch`), else exactly B.
        exporter: `dynamo` is torch's current one; `legacy` traces, is deprecated, and six to eighteen times
            faster.
    """
    names: dict[str, Any] = {"input_names": [INPUT_NAME], "output_names": [OUTPUT_NAME]}
    with evaluating(model), quiet(), torch.no_grad(), OnnxSpelling():
        if exporter == "dynamo":
            shapes = ({0: torch.export.Dim(BATCH_NAME)},) if dynamic_batch else None
            program = torch.onnx.export(
                model,
                (images_BCHW,),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                external_data=False,
                optimize=False,
                verbose=False,
                **names,
            )
            assert program is not None  # None only comes from the legacy exporter
            _optimize(program.model, {name for name, _ in model.named_parameters()})
            program.save(str(path), external_data=False)
        else:
            axes = {name: {0: BATCH_NAME} for name in (INPUT_NAME, OUTPUT_NAME)} if dynamic_batch else None
            with _one_argument(model):
                torch.onnx.export(
                    model,
                    (images_BCHW,),
                    str(path),
                    dynamo=False,
                    opset_version=min(opset, LEGACY_MAX_OPSET),
                    dynamic_axes=axes,
                    # ONNX Runtime folds constants itself; folding here would replace parameters.
                    do_constant_folding=False,
                    **names,
                )


@contextlib.contextmanager
def _one_argument(model: nn.Module) -> Iterator[None]:
    """Let `forward` take images only: the legacy exporter hands on every other argument's default by its place."""
    own, forward = model.__dict__.get("forward"), model.forward
    model.forward = lambda images_BCHW: forward(images_BCHW)
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _optimize(graph: Any, parameters: set[str]) -> None:
    """Simplify the exporter's graph, but keep every parameter as it is.

    The exporter's own optimization also folds parameters into larger constants (tables of relative positions
    become a vector per pair of patches), so that the file no longer holds the Model's parameters. ONNX
    Runtime does such folding itself when it loads a file.
    """
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import fold_constants

    def should_fold(node: Any) -> bool | None:
        """Of what touches a parameter, only the transposed weights of linear layers may be computed ahead."""
        if not any(value is not None and value.name in parameters for value in node.inputs):
            return None
        perm = node.attributes.get("perm") if node.op_type == "Transpose" else None
        return None if perm is not None and list(perm.as_ints()) == [1, 0] else False

    fold_constants(graph, onnx_shape_inference=True, should_fold=should_fold)
    # The exporter's pattern rewriting is left out: it takes longer than all else, and made no file faster.
    for simplify in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.NameFixPass(),
    ):
        simplify(graph)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and log lines below errors of torch's exporters; they speak to exporter developers."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def input_shape(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width in pixels of the images that a timm-style model takes.

    Raises:
        UserError: the model does not say.
    """
    arch = getattr(model, "arch", None)
    if isinstance(arch, Arch):
        return arch.input_size
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    shape = config.get("input_size")
    patch_embed = getattr(model, "patch_embed", None)
    # What the network was built for counts for more than what its weights were trained on.
    size = getattr(patch_embed, "img_size", None) or (shape[1:] if shape else None)
    chans = getattr(getattr(patch_embed, "proj", None), "in_channels", None) or (shape[0] if shape else None)
    if size is None or chans is None:
        raise UserError(
            f"{type(model).__name__} does not say which images it takes; a model needs an arch, a "
            "pretrained_cfg or a patch_embed. Pass example images."
        )
    return int(chans), int(size[0]), int(size[1])


def model_device(model: nn.Module) -> torch.device:
    """Where the first parameter lies; the CPU for a model without parameters."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def model_dtype(model: nn.Module) -> torch.dtype:
    """Type of the first parameter; float32 for a model without parameters."""
    first = next(model.parameters(), None)
    return torch.float32 if first is None else first.dtype


def random_images(shape_BCHW: tuple[int, int, int, int], *, seed: int = 0) -> Tensor:
    """float32 noise of that shape from its own generator, so that the global one is left alone."""
    return torch.randn(shape_BCHW, generator=torch.Generator().manual_seed(seed))
