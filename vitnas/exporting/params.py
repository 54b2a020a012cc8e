"""Does an ONNX file hold the Model's parameters, all of them and nothing beside?

Exporters rename, transpose and share tensors, so names are no help; contents are. A parameter counts as
exported if some float tensor of the file has its values in the same order, as it is or transposed (linear
layers). Equal parameters may share one tensor, and a parameter of zeros alone counts even if its addition was
left out. What the file holds beyond parameters and buffers is counted as other elements.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn


def match_params(model: nn.Module, proto: Any) -> dict[str, Any]:
    """Compare the parameters of `model` with the float tensors of an ONNX model.

    Returns:
        `params`: elements of the model's parameters; `exported_params`: of those found in the file;
        `missing_params`: names of those not found (unused, or folded into another by the exporter);
        `params_equal`: the first two are equal; `other_elements`: float elements in the file that are neither
        parameter nor buffer.
    """
    held = {_digest(array): array.size for array in _float_arrays(proto)}
    found, missing, used = 0, [], set()
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        hit = next((digest for digest in _digests(parameter) if digest in held), None)
        if hit is None and bool(parameter.any()):
            missing.append(name)
        else:
            found += parameter.numel()
            used.add(hit or b"")
    for buffer in model.buffers():
        used.update(_digests(buffer))
    total = sum(parameter.numel() for parameter in parameters.values())
    return {
        "params": total,
        "exported_params": found,
        "params_equal": found == total,
        "missing_params": missing,
        "other_elements": sum(size for digest, size in held.items() if digest not in used),
    }


def _float_arrays(proto: Any) -> Iterator[np.ndarray[Any, Any]]:
    """Initialisers and constants of floating type."""
    from onnx import TensorProto, numpy_helper

    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
    constants = (
        attribute.t for node in proto.graph.node for attribute in node.attribute if attribute.HasField("t")
    )
    for tensor in (*proto.graph.initializer, *constants):
        if tensor.data_type in floats and math.prod(tensor.dims) > 0:
            yield numpy_helper.to_array(tensor)


def _digests(tensor: Tensor) -> Iterator[bytes]:
    array = tensor.detach().cpu().numpy()
    yield _digest(array)
    if array.ndim == 2:
        yield _digest(array.T)


def _digest(array: np.ndarray[Any, Any]) -> bytes:
    """Of the values in order, without the shape: exporters also add and drop axes of size 1."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
