"""Files of half or 8-bit precision, held against the float32 file: by accuracy on held-out images and by the clock.

INT8 is ONNX Runtime's static quantisation: ranges of activations come from images, weights are per channel. Only what
multiplies by a weight is 8-bit. Where that loses more than half a point, the layers that change the answers most, each
measured alone, stay in float32 (as in Nagel et al., arXiv 2106.08295, section 4.4).

Legend: N images, Y classes.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from vitnas.exporting.describe import form_of, prepared_inside
from vitnas.exporting.front import NUMBERS, with_front
from vitnas.exporting.onnx import onnx_runner
from vitnas.exporting.pixels import choice_of, pixels_of
from vitnas.exporting.quick import export_quickly
from vitnas.exporting.verify import ExportError
from vitnas.measure.latency import FASTER, LatencyMeter
from vitnas.measure.target import LatencyTarget
from vitnas.model.scale import explained, scale_of
from vitnas.runs import write_with

Precision: TypeAlias = Literal["fp16", "int8"]
Format: TypeAlias = Literal[
    "onnx", "torch_export", "onnx_float", "torch_export_float", "onnx_fp16", "onnx_int8", "executorch"
]
LOST = 0.005  # of accuracy, at most
CALIBRATED = 256  # images that ranges are taken from, at most, and half of those there are
TRIED = 64  # images by which layers are told apart
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Beside:
    """How a file does beside the float32 one, on the same held-out images and in the same rounds.

    Args:
        accuracy, accuracy_fp32: on `n` images that nothing else of the file came from; without labels the share of
            images of the float32 file's first class, and 1; of numbers R^2, of the labels or of what that file says.
        ms, fp32_ms: medians on `target`.
        left_out: layers that stay in float32, of `layers`.
    """

    precision: Precision
    accuracy: float
    accuracy_fp32: float
    n: int
    has_labels: bool
    ms: float
    fp32_ms: float
    target: str
    left_out: tuple[str, ...] = ()
    layers: int = 0
    numbers: bool = False

    @property
    def is_close(self) -> bool:
        """Whether it loses at most half a point."""
        return self.accuracy_fp32 - self.accuracy <= LOST

    @property
    def is_faster(self) -> bool:
        return self.ms < FASTER * self.fp32_ms

    def __str__(self) -> str:
        what, pair = (
            "accuracy" if self.has_labels else "same first class",
            (self.accuracy, self.accuracy_fp32),
        )
        told = " against ".join(f"{100 * each:.1f} %" for each in pair)
        if self.numbers:
            what = "R²" if self.has_labels else "R² of its answers"
            told = " against ".join(f"{each:.4f}" for each in pair)
        kept = f", {len(self.left_out)} of {self.layers} layers in float32" if self.left_out else ""
        return (
            f"{what} {told} on {self.n} held-out images, "
            f"{self.ms:.3g} ms against {self.fp32_ms:.3g} on {self.target}{kept}"
        )


class Judged:
    """Held-out images with labels, in two halves: by the first a file is made, by the second it is judged."""

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]], has_labels: bool) -> None:
        images_NCHW = torch.cat([images for images, _ in batches])
        order = torch.randperm(len(images_NCHW), generator=torch.Generator().manual_seed(0))
        half = max(1, len(order) // 2)
        self.images_NCHW = images_NCHW[order]
        self.targets = torch.cat([targets for _, targets in batches])[order] if has_labels else None
        self.calibration_NCHW = self.images_NCHW[: min(half, CALIBRATED)]
        self.rest = slice(half if len(order) > 1 else 0, None)


def export_precise(
    model: nn.Module,
    path: Path,
    judged: Judged,
    precision: Precision,
    *,
    target: str,
    opset: int,
    class_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Beside | None, str]:
    """Write `model` as an ONNX file of another precision that takes pixels, if it is worth having.

    A float16 file is returned where it loses at most half a point: it is half as large, and for other devices. An
    8-bit one must be faster here, too.

    Returns:
        The record of the export (of the float32 file where there is no other), how the file does beside that, and why
        it was not written, or "".

    Raises:
        ExportError: the float32 file cannot be written.
    """
    about: dict[str, Any] = {"class_names": class_names, "data_config": data_config, "opset": opset}
    images_NCHW = judged.images_NCHW[:BATCH]
    with tempfile.TemporaryDirectory(prefix="vitnas-export-") as folder:
        base, core, whole = (Path(folder) / f"{name}.onnx" for name in ("base", "core", "whole"))
        record = export_quickly(model, base, images_NCHW, **about)
        choice = choice_of(model)
        if choice == "none":
            return record, None, "it gives features, and no classes to judge an 8-bit or half file by"
        left_out: tuple[str, ...] = ()
        layers = 0
        try:
            if precision == "fp16":
                record = export_quickly(copy.deepcopy(model).half(), core, images_NCHW, **about)
            else:
                left_out, layers = quantise(base, core, judged.calibration_NCHW, choice)
                want_NY, got_NY = _answers(base, images_NCHW), _answers(core, images_NCHW)
                record["max_abs_diff"] = float((got_NY - want_NY).abs().max())
                record["top1_agreement"] = None if choice == NUMBERS else 1 - _other(got_NY, want_NY, choice)
            form = prepared_inside(form_of(model, list(images_NCHW.shape[1:]), data_config))
            _join(core, whole, form, choice, base)
            beside = _beside(base, core, whole, judged, form, precision, target, model)
        except ExportError as error:
            return record, None, str(error)
        beside = Beside(**{**vars(beside), "left_out": left_out, "layers": layers})
        if reason := why_not(beside):
            return record, beside, reason
        write_with(path, partial(copyfile, whole))
    return {**record, "path": str(path), "bytes": path.stat().st_size, "input": "uint8"}, beside, ""


def why_not(beside: Beside) -> str:
    """Why a file is not returned; "" where it is."""
    if not beside.is_close:
        most = f"{LOST:g} of R²" if beside.numbers else f"{100 * LOST:g} points"
        return f"it loses more than {most} ({beside})"
    if beside.precision == "int8" and not beside.is_faster:
        return f"it is not faster here ({beside})"
    return ""


def quantise(
    base: Path, file: Path, images_NCHW: Tensor, choice: str = "softmax"
) -> tuple[tuple[str, ...], int]:
    """Write an ONNX file in 8 bits, but for layers without which the answers stay; returns their names, and how many
    layers there are.

    Args:
        base: takes prepared images and gives logits, float32.
        images_NCHW: from which ranges come, and by whose answers layers are judged.
        choice: what makes an answer of logits.

    Raises:
        ExportError: ONNX Runtime cannot quantise it.
    """
    with tempfile.TemporaryDirectory(prefix="vitnas-quantise-") as folder:
        ready = Path(folder) / "ready.onnx"
        try:
            layers, ranges = _calibrated(base, ready, images_NCHW)
            few_NCHW = images_NCHW[:TRIED]
            want_NY, tried = _answers(base, few_NCHW), Path(folder) / "tried.onnx"

            def damage(names: Collection[str]) -> tuple[float, float]:
                """Share of answers that are others, and mean squared change, with these layers in 8 bits."""
                _write_quantised(ready, tried, ranges, names)
                got_NY = _answers(tried, few_NCHW)
                return _other(got_NY, want_NY, choice), float((got_NY - want_NY).square().mean())

            order: list[str] = []
            left = 0
            while damage([name for name in layers if name not in order[:left]])[0] > LOST:
                order = order or sorted(layers, key=lambda name: -damage([name])[1])
                left = 2 * left or 1
                if left >= len(layers):
                    raise ExportError("in 8 bits each of its layers changes the answers")
            _write_quantised(ready, file, ranges, [name for name in layers if name not in order[:left]])
        except ExportError:
            raise
        except Exception as error:  # its tools raise many kinds
            raise ExportError(
                f"ONNX Runtime cannot quantise it ({str(error).splitlines()[0][:160] if str(error) else error!r})"
            ) from error
    return tuple(order[:left]), len(layers)


def _other(got_NY: Tensor, want_NY: Tensor, choice: str) -> float:
    """Share of images of another first class; of numbers what is not explained of those that should be."""
    if choice == NUMBERS:
        return float(1 - explained(got_NY, want_NY).mean())
    return float((got_NY.argmax(1) != want_NY.argmax(1)).float().mean())


def _calibrated(base: Path, ready: Path, images_NCHW: Tensor) -> tuple[list[str], Any]:
    """Simplify a file into `ready`; its layers that multiply by a weight, and the ranges of what goes through them."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, create_calibrator
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(base), str(ready), skip_symbolic_shape=True)
    proto = onnx.load(str(ready))
    constants = {tensor.name for tensor in proto.graph.initializer}
    for number, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    onnx.save(proto, str(ready))
    kinds = ("MatMul", "Gemm", "Conv")
    layers = [node for node in proto.graph.node if node.op_type in kinds and node.input[1] in constants]
    if not layers:
        raise ExportError("none of its layers multiplies by a weight")

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # it has no types
        def __init__(self) -> None:
            name = proto.graph.input[0].name
            self.batches: Iterator[Any] = iter({name: part.numpy()} for part in images_NCHW.split(BATCH))

        def get_next(self) -> Any:
            return next(self.batches, None)

    calibrator = create_calibrator(ready, list(kinds), str(ready.with_name("augmented.onnx")))
    calibrator.collect_data(Reader())
    return [node.name for node in layers], calibrator.compute_data()


def _write_quantised(ready: Path, file: Path, ranges: Any, names: Collection[str]) -> None:
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    quantizer = QDQQuantizer(
        onnx.load(str(ready)),
        per_channel=True,
        reduce_range=True,  # processors without VNNI overflow with 8 bits of weights
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=ranges,
        nodes_to_quantize=list(names),
        nodes_to_exclude=[],
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        extra_options={"DedicatedQDQPair": True},
    )
    quantizer.quantize_model()
    quantizer.model.save_model_to_file(str(file), False)


def _answers(file: Path, images: Tensor) -> Tensor:
    run = onnx_runner(file)
    return torch.cat([run(part).float() for part in images.split(BATCH)])


def _join(core: Path, whole: Path, form: Any, choice: str, base: Path) -> None:
    """Let `core` take pixels, with what `base` says of itself."""
    import onnx

    proto, said = onnx.load(str(core)), onnx.load(str(base))
    proto.ir_version = max(proto.ir_version, said.ir_version)
    del proto.metadata_props[:]
    proto.metadata_props.extend(said.metadata_props)
    onnx.save(with_front(proto, form, choice), str(whole))


def _beside(
    base: Path,
    core: Path,
    whole: Path,
    judged: Judged,
    form: Any,
    precision: Precision,
    target: str,
    model: nn.Module,
) -> Beside:
    images_NCHW, choice, scale = judged.images_NCHW[judged.rest], choice_of(model), scale_of(model)
    targets = None if judged.targets is None or choice == "sigmoid" else judged.targets[judged.rest]
    want, got = _answers(base, images_NCHW), _answers(whole, pixels_of(images_NCHW, form))
    times = LatencyMeter(target).compare_onnx({"fp32": base, precision: core})
    if choice == NUMBERS and scale is not None:
        right = want if targets is None else scale.restored(targets)
        accuracies = [float(explained(each, right).mean()) for each in (got, want)]
    else:
        right = want.argmax(1) if targets is None else targets
        accuracies = [float((each.argmax(1) == right).float().mean()) for each in (got, want)]
    return Beside(
        precision=precision,
        accuracy=accuracies[0],
        accuracy_fp32=accuracies[1],
        numbers=choice == NUMBERS,
        n=len(images_NCHW),
        has_labels=targets is not None,
        ms=times[precision].median_ms,
        fp32_ms=times["fp32"].median_ms,
        target=target,
    )


def onnx_target(targets: Sequence[str]) -> str:
    """The first of the targets that files are timed on by ONNX Runtime, in float32."""
    fits = (text for text in targets if text.startswith("onnxruntime") and "float16" not in text)
    return next(fits, str(LatencyTarget()))
