"""An ONNX file that takes pixels: what prepares images is put in front of the network's graph, and what makes
probabilities or numbers behind it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from vitnas.data.images import Form
from vitnas.exporting.opset import settle_ir
from vitnas.exporting.pixels import Prepare
from vitnas.measure.convert import BATCH_NAME, INPUT_NAME, LEGACY_MAX_OPSET, OUTPUT_NAME, quiet
from vitnas.model.scale import Scale

PIXELS_NAME, NUMBERS = "images", "numbers"
ANSWERS = {"softmax": "probabilities", "sigmoid": "probabilities", "numbers": NUMBERS, "none": "features"}
AXES = {0: BATCH_NAME, 1: "height", 2: "width"}
BEFORE = "prepare/"


def with_front(core: Any, form: Form, choice: str) -> Any:
    """A model whose input `images` is uint8 (batch, height, width, channels), for one with the input `input`.

    Args:
        core: the network, whose output is `logits`, or `numbers` (`with_numbers`).
        choice: `softmax`, `sigmoid`, `numbers` or `none`.
    """
    import onnx
    from onnx import TensorProto, compose, helper

    front = compose.add_prefix(_prepare(form, core.opset_import[0].version), BEFORE, rename_functions=False)
    front.ir_version = core.ir_version
    kind = core.graph.input[0].type.tensor_type.elem_type
    last = front.graph.output[0].name
    if kind != TensorProto.FLOAT:
        front.graph.node.append(helper.make_node("Cast", [last], [f"{last}/cast"], to=kind))
        front.graph.output[0].CopyFrom(helper.make_tensor_value_info(f"{last}/cast", kind, None))
        last = f"{last}/cast"
    merged = compose.merge_models(front, core, io_map=[(last, INPUT_NAME)])
    for node in merged.graph.node:  # the input's own name has no prefix
        node.input[:] = [PIXELS_NAME if name == f"{BEFORE}{PIXELS_NAME}" else name for name in node.input]
    merged.graph.input[0].name = PIXELS_NAME
    if choice != NUMBERS:
        _answer(merged, choice, cast=kind != TensorProto.FLOAT)
    del merged.metadata_props[:]
    merged.metadata_props.extend(core.metadata_props)
    merged.producer_name, merged.producer_version = core.producer_name, core.producer_version
    onnx.checker.check_model(merged)
    return merged


def with_numbers(core: Any, scale: Scale) -> Any:
    """A network's model that gives numbers in units of theirs, float32, in place of `logits`."""
    import onnx
    from onnx import TensorProto, helper

    core.graph.node.append(helper.make_node("Cast", [OUTPUT_NAME], ["numbers/float"], to=TensorProto.FLOAT))
    steps = (
        ("Mul", "numbers/float", "numbers/scaled", scale.std),
        ("Add", "numbers/scaled", NUMBERS, scale.mean),
    )
    for word, taken, given, values in steps:
        tensor = helper.make_tensor(f"{given}/by", TensorProto.FLOAT, [len(values)], values)
        core.graph.initializer.append(tensor)
        core.graph.node.append(helper.make_node(word, [taken, tensor.name], [given]))
    core.graph.output[0].name = NUMBERS
    core.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.checker.check_model(core)
    return core


def _answer(proto: Any, choice: str, *, cast: bool) -> None:
    """Put what makes an answer of logits behind the graph, in float32."""
    from onnx import TensorProto, helper

    output, name = proto.graph.output[0], OUTPUT_NAME
    if cast:
        proto.graph.node.append(helper.make_node("Cast", [name], [f"{name}/float"], to=TensorProto.FLOAT))
        name = f"{name}/float"
    kind = {"softmax": "Softmax", "sigmoid": "Sigmoid", "none": "Identity"}[choice]
    options = {"axis": 1} if choice == "softmax" else {}
    proto.graph.node.append(helper.make_node(kind, [name], [ANSWERS[choice]], **options))
    output.name = ANSWERS[choice]
    output.type.tensor_type.elem_type = TensorProto.FLOAT


def _prepare(form: Form, opset: int) -> Any:
    """What prepares images, as an ONNX model of its own."""
    import onnx

    images_BHWC = torch.zeros(2, 5, 7, form.in_chans, dtype=torch.uint8)
    names: dict[str, Any] = {"input_names": [PIXELS_NAME], "output_names": [INPUT_NAME]}
    with tempfile.TemporaryDirectory(prefix="vitnas-export-") as folder, quiet(), torch.no_grad():
        file = str(Path(folder) / "prepare.onnx")
        axes = {PIXELS_NAME: AXES, INPUT_NAME: {0: BATCH_NAME}}
        # Traced, which takes a tenth of the time; nothing in it depends on the example.
        torch.onnx.export(
            Prepare(form).eval(),
            (images_BHWC,),
            file,
            dynamo=False,
            opset_version=min(opset, LEGACY_MAX_OPSET),
            dynamic_axes=axes,
            **names,
        )
        proto = onnx.load(file)
    for node in proto.graph.node:
        node.doc_string = ""
    proto.opset_import[0].version = opset
    settle_ir(proto)
    return proto
