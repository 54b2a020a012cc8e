"""Older operator sets: torch's current exporter writes 18 and newer, and many runtimes on devices stop at 17."""

from __future__ import annotations

from typing import Any

from vitnas.errors import UserError
from vitnas.exporting.verify import ExportError

MIN_OPSET, OPSET = 17, 20  # the first with LayerNormalization, and what is written by default
MAX_OPSET = 25  # what torch's exporter converts to


def check_opset(name: str, opset: int) -> None:
    """Raise UserError where files are not written in that operator set."""
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise UserError(
            f"{name} is {opset}; files are written with {MIN_OPSET} to {MAX_OPSET}. Use {MIN_OPSET} for old runtimes, "
            "or leave it out."
        )


def lower(proto: Any, opset: int) -> None:
    """Write a model in an older operator set and the file version that belongs to it, in place.

    Two kinds of operators of ViTs changed with 18: reductions take their axes as an input since, and Split may be told
    into how many parts.

    Raises:
        ExportError: it has an operator that the older set lacks or has in another form.
    """
    import onnx

    constants, written = (
        {tensor.name: tensor for tensor in proto.graph.initializer},
        proto.opset_import[0].version,
    )
    for node in proto.graph.node:
        if node.op_type.startswith("Reduce") and len(node.input) == 2 and node.op_type != "ReduceSum":
            axes = onnx.numpy_helper.to_array(constants[node.input[1]]).tolist()
            del node.input[1:]
            _drop(node, "noop_with_empty_axes")
            node.attribute.append(onnx.helper.make_attribute("axes", axes))
        elif node.op_type == "Split":
            _drop(node, "num_outputs")
        elif _form(node.op_type, written) != _form(node.op_type, opset):
            raise ExportError(f"operator set {opset} has no {node.op_type} as this model needs it")
    used = {name for node in proto.graph.node for name in node.input}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    proto.opset_import[0].version = opset
    settle_ir(proto)


def settle_ir(proto: Any) -> None:
    """Give a model the oldest file version that its operator set comes with."""
    import onnx

    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)


def _drop(node: Any, name: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def _form(kind: str, opset: int) -> tuple[list[str], set[str]] | None:
    """What an operator takes in a set, by names; None where there is none."""
    import onnx

    try:
        schema = onnx.defs.get_schema(kind, max_inclusive_version=opset)
    except onnx.defs.SchemaError:
        return None
    return [item.name for item in schema.inputs], set(schema.attributes)
