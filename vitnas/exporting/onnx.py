"""ONNX: one file, dynamic batch, verified in ONNX Runtime against the Model before it takes its place.

Torch's current (dynamo) exporter is tried first. If it fails, or its file computes something else (it
happens: pytorch#169178, #166797), the legacy exporter is tried, and the record says so.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitnas.data.images import Form
from vitnas.errors import first_line
from vitnas.exporting.describe import PIXELS, TENSORS, describe, form_of, prepared_inside
from vitnas.exporting.front import NUMBERS, with_front, with_numbers
from vitnas.exporting.opset import OPSET, check_opset, lower, settle_ir
from vitnas.exporting.params import match_params
from vitnas.exporting.pixels import Answering, Ready, choice_of, other_size, pixels_of
from vitnas.exporting.verify import Agreement, ExportError, Run, example_images, traced_images, verify
from vitnas.layers.relative_position import RelativePosition2d
from vitnas.measure.convert import LEGACY_MAX_OPSET, Exporter, convert
from vitnas.model.scale import scale_of
from vitnas.runs import write_with
from vitnas.version import VERSION

DYNAMO_MIN_OPSET = 18  # what torch's current exporter writes
MAX_BYTES = 2**31 - 2**20  # one protobuf file holds 2 GiB; the graph itself needs a little


def unsupported(model: nn.Module) -> list[str]:
    """Why ONNX cannot take `model`; empty if nothing is known to stand in the way."""
    reasons = []
    kind = type(model).__name__
    if hasattr(model, "_orig_mod") or kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
        inside = "_orig_mod" if hasattr(model, "_orig_mod") else "module"
        reasons.append(f"{kind} is a wrapper; export what it wraps, model.{inside}")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1:
        reasons.append(f"parameters mix {', '.join(sorted(map(str, dtypes)))}; use one, e.g. model.float()")
    for dtype in sorted(dtypes - {torch.float32, torch.float16}, key=str):
        reasons.append(f"parameters are {dtype}; ONNX Runtime takes float32 or float16, e.g. model.float()")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > MAX_BYTES:
        reasons.append(f"weights take {size / 2**30:.1f} GiB; a single ONNX file holds 2 GiB")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            reasons.append(f"parameter {name} is on the meta device; it has no values")
        elif not bool(parameter.isfinite().all()):
            reasons.append(f"parameter {name} has values that are not finite")
    return reasons


def export_onnx(
    model: nn.Module,
    path: Path | str,
    images: Tensor | None = None,
    *,
    opset: int = OPSET,
    dynamic_batch: bool = True,
    tolerance: float | None = None,
    class_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    exporter: Exporter | None = None,
    pixels: bool = False,
) -> dict[str, Any]:
    """Write `model` as one ONNX file with input `input` (B, C, H, W) and output `logits` (B, Y), or `numbers` (B, T) of
    a model that tells numbers, in units of theirs.

    The file also holds, as metadata, the Arch, class names, mean, std and image size, and the version of
    vitnas. The model's mode, weights and gradients stay as they are.

    With `pixels` it needs nothing else: its input is `images`, uint8 (B, H, W, C) of any height and width, which it
    resizes, crops and normalises as in training, and its output `probabilities` (B, Y), or `numbers`.

    Args:
        images: preprocessed (B, C, H, W) images for the comparison with the Model; noise if None.
        opset: ONNX operator set, 17 or more (ONNX Runtime 1.12 reads 17); the file's version is the one it came with.
        dynamic_batch: False writes a file for batches of 1.
        tolerance: allowed difference of the logits (see `Agreement`); 1e-4 in float32.
        class_names: names of the classes in order.
        data_config: `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode` of the training images, where they differ
            from the model's `pretrained_cfg`.
        exporter: use only `dynamo` or only `legacy`.

    Returns:
        The record: path, bytes, opset, exporter, parameter counts, agreement, problems in words.

    Raises:
        ExportError: the model cannot be exported (with the reasons), or no exporter's file agrees with it. A
            file that was at `path` before is untouched.
        UserError: wrong images, opset or class names; `path` cannot be written; with `pixels`, that it is not known
            how images are prepared.
    """
    path, started = Path(path), time.perf_counter()
    check_opset("opset", opset)
    reasons = unsupported(model)
    if reasons:
        raise ExportError(f"ONNX cannot take this {type(model).__name__}: {'; '.join(reasons)}.")
    tried, problems = [exporter] if exporter else ["dynamo", "legacy"], []
    examples, real = example_images(model, images)
    if not real:
        problems.append("No images were given, so the comparison used noise.")
    input_size = list(examples.shape[1:])
    form = prepared_inside(form_of(model, input_size, data_config)) if pixels else None
    takes = PIXELS if pixels else TENSORS
    properties = describe(model, input_size, class_names, data_config, takes=takes)
    with tempfile.TemporaryDirectory(prefix="vitnas-export-") as folder:
        for number, name in enumerate(tried):
            file = Path(folder) / f"{name}.onnx"
            try:
                if name == "legacy" and dynamic_batch and _has_relative_positions(model):
                    raise ExportError(
                        "it fixes the batch of relative positions; dynamo or dynamic_batch=False can."
                    )
                convert(
                    model,
                    file,
                    traced_images(examples, dynamic_batch=dynamic_batch),
                    exporter=name,  # type: ignore[arg-type]  # one of the two names above
                    opset=max(opset, DYNAMO_MIN_OPSET) if name == "dynamo" else opset,
                    dynamic_batch=dynamic_batch,
                )
                params = _finish(model, file, properties, opset)
                agreement = _verify(model, file, examples, real, tolerance, dynamic_batch)
                if choice_of(model) == NUMBERS:
                    agreement = _tell_numbers(model, file, examples, agreement)
                if form is not None:
                    agreement = _take_pixels(model, file, form, examples, agreement)
            except Exception as error:  # exporters raise anything; the next one may do better
                problems.append(f"The {name} exporter failed: {first_line(error)}.")
                if number + 1 < len(tried):
                    continue
                raise ExportError(f"{path.name} cannot be exported. {' '.join(problems)}") from error
            write_with(path, partial(shutil.copyfile, file))
            break
    if not params["params_equal"]:
        problems.append(_params_problem(params))
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "exporter": name,
        "opset": opset if name == "dynamo" else min(opset, LEGACY_MAX_OPSET),
        "input": "uint8" if pixels else "float",
        "dynamic_batch": dynamic_batch,
        **params,
        **agreement.to_json(),
        "problems": problems,
        "seconds": round(time.perf_counter() - started, 3),
        "versions": _versions(),
    }


def _has_relative_positions(model: nn.Module) -> bool:
    return any(isinstance(module, RelativePosition2d) for module in model.modules())


def onnx_session(file: Path | str) -> Any:
    """An ONNX Runtime session on the CPU with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = 1, 1, 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def onnx_runner(file: Path | str) -> Run:
    """A function from images, as the file takes them, to its (B, Y) answers, on the CPU with one thread."""
    session = onnx_session(file)

    def run(images: Tensor) -> Tensor:
        output = session.run(None, {session.get_inputs()[0].name: images.cpu().numpy()})[0]
        return torch.from_numpy(output)

    return run


def _finish(model: nn.Module, file: Path, properties: dict[str, str], opset: int) -> dict[str, Any]:
    """Check the file, put the metadata in, take the exporter's debug notes out; compare parameters."""
    import onnx

    proto = onnx.load(str(file), load_external_data=False)
    if proto.opset_import[0].version > opset:
        lower(proto, opset)
    settle_ir(proto)
    del proto.metadata_props[:]
    for key, value in properties.items():
        proto.metadata_props.add(key=key, value=value)
    # Stack traces of the exporting machine: of no use to a reader, and half of a small file.
    graph = proto.graph
    values = (*graph.value_info, *graph.initializer, *graph.input, *graph.output)
    for item in (graph, *graph.node, *values, *proto.functions):
        del item.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
    onnx.checker.check_model(proto)
    onnx.save(proto, str(file))
    return match_params(model, proto)


def _verify(
    model: nn.Module, file: Path, images: Tensor, real: bool, tolerance: float | None, dynamic_batch: bool
) -> Agreement:
    return verify(
        model,
        onnx_runner(file),
        images,
        name="the ONNX file",
        real_images=real,
        tolerance=tolerance,
        dynamic_batch=dynamic_batch,
    )


def _tell_numbers(model: nn.Module, file: Path, images_BCHW: Tensor, agreement: Agreement) -> Agreement:
    """Let the file give numbers in units of theirs, and compare it, as it now is. There are no classes to agree on."""
    import onnx

    scale = scale_of(model)
    assert scale is not None
    onnx.save(with_numbers(onnx.load(str(file)), scale), str(file))
    verify(
        Answering(model),
        onnx_runner(file),
        images_BCHW,
        name="the ONNX file",
        real_images=agreement.real_images,
        tolerance=agreement.tolerance,
        dynamic_batch=len(agreement.batch_sizes) > 1,
    )
    return replace(agreement, top1_agreement=None)


def _take_pixels(
    model: nn.Module, file: Path, form: Form, images_BCHW: Tensor, agreement: Agreement
) -> Agreement:
    """Let the file take pixels, and compare it, as it now is, with the Model behind what prepares images in torch."""
    import onnx

    proto = with_front(onnx.load(str(file)), form, choice_of(model))
    onnx.save(proto, str(file))
    whole, run = Ready(model, form), onnx_runner(file)
    same = pixels_of(images_BCHW, form)
    for images_BHWC in (same, other_size(same)):
        verify(
            whole,
            run,
            images_BHWC,
            name="the ONNX file",
            real_images=agreement.real_images,
            tolerance=agreement.tolerance,
            dynamic_batch=len(agreement.batch_sizes) > 1,
        )
    return agreement


def _params_problem(params: dict[str, Any]) -> str:
    missing = params["missing_params"]
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return f"The file does not hold these parameters as they are (unused or folded into others): {shown}."


def _versions() -> dict[str, str]:
    import onnx
    import onnxruntime

    return {
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "vitnas": VERSION,
    }
