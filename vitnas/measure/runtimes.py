"""Calls that the clock can time: a Model or an ONNX file, made ready on a target with a fixed batch of images.

Also the fixed workload that every measurement is interleaved with. It is one 3x3 convolution and one matrix
product, 42 million multiply-accumulates, the same in both runtimes, whatever the Model.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from vitnas.errors import UserError, first_line
from vitnas.measure.convert import BATCH_NAME, random_images
from vitnas.measure.target import RUNS_ONNX, LatencyTarget

Call: TypeAlias = Callable[[], object]

_CHANNELS, _SIDE, _WIDTH = 64, 28, 256


def require_device(target: LatencyTarget) -> None:
    """Check that this machine can run `target`.

    Raises:
        UserError: the device or the runtime's support for it is missing.
    """
    if target.runtime == "openvino" and find_spec("openvino") is None:
        raise UserError(
            f"latency target is {str(target)!r}; OpenVINO is not installed. Run: pip install 'vitnas[openvino]'."
        )
    if target.runtime == "torch_compile" and not (
        target.device.startswith("cuda")
        or any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl")))
    ):
        raise UserError(
            f"latency target is {str(target)!r}; torch.compile needs a C++ compiler, and there is none. Install "
            "g++, or use torch."
        )
    if not target.device.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        raise UserError(
            f"latency target is {str(target)!r}; this machine has no CUDA device. Use device=cpu."
        )
    if target.runtime == "onnxruntime":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise UserError(
                f"latency target is {str(target)!r}; the installed onnxruntime has no CUDA support. "
                "Install onnxruntime-gpu in its place, or use device=cpu or torch."
            )


def onnx_session(onnx_file: Path | str | bytes, target: LatencyTarget) -> Any:
    """An ONNX Runtime session with the target's threads and batch.

    A dynamic batch axis is fixed to the target's batch, as a deployment with a known batch would do; ONNX
    Runtime then folds the shape arithmetic away (worth 5-10 % on small ViTs), and dynamic and static files
    measure alike.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = target.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_free_dimension_override_by_name(BATCH_NAME, target.batch)
    # Idle threads of one session must not spin on the cores while another session is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    provider: Any = "CPUExecutionProvider"
    if target.device.startswith("cuda"):
        provider = ("CUDAExecutionProvider", {"device_id": torch.device(target.device).index or 0})
    source = onnx_file if isinstance(onnx_file, bytes) else str(onnx_file)
    return onnxruntime.InferenceSession(source, options, providers=[provider])


def onnx_call(onnx_file: Path | str | bytes, target: LatencyTarget, shape_CHW: tuple[int, ...]) -> Call:
    """A call that runs the file on `target.batch` fixed images; on a GPU these and the result stay there."""
    session = onnx_session(onnx_file, target)
    node = session.get_inputs()[0]
    images = random_images((target.batch, *shape_CHW)).numpy()  # type: ignore[arg-type]  # three sizes
    images = images.astype(np.float16 if "float16" in node.type else np.float32)
    if not target.device.startswith("cuda"):
        feed = {node.name: images}
        return lambda: session.run(None, feed)
    return _bound_call(session, node.name, images, target)


def openvino_call(onnx_file: Path | str | bytes, target: LatencyTarget, shape_CHW: tuple[int, ...]) -> Call:
    """A call that runs the file in OpenVINO on `target.batch` fixed images, in the precision of the file."""
    import openvino

    core = openvino.Core()
    network = core.read_model(onnx_file if isinstance(onnx_file, bytes) else str(onnx_file))
    network.reshape([target.batch, *shape_CHW])
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": target.threads,
        "INFERENCE_PRECISION_HINT": "f16" if target.dtype == "float16" else "f32",
    }
    request = core.compile_model(network, "CPU", options).create_infer_request()
    images = random_images((target.batch, *shape_CHW)).numpy()  # type: ignore[arg-type]  # three sizes
    images = images.astype(np.float16 if "f16" in str(network.input(0).element_type) else np.float32)
    return lambda: request.infer([images], share_inputs=True, share_outputs=True)


def file_call(onnx_file: Path | str | bytes, target: LatencyTarget, shape_CHW: tuple[int, ...]) -> Call:
    """A call that runs an ONNX file on the target."""
    made = openvino_call if target.runtime == "openvino" else onnx_call
    return made(onnx_file, target, shape_CHW)


def _bound_call(session: Any, input_name: str, images: np.ndarray[Any, Any], target: LatencyTarget) -> Call:
    import onnxruntime

    index = torch.device(target.device).index or 0
    binding = session.io_binding()
    value = onnxruntime.OrtValue.ortvalue_from_numpy(images, "cuda", index)
    binding.bind_ortvalue_input(input_name, value)
    binding.bind_output(session.get_outputs()[0].name, "cuda", index)

    def call() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return call


def torch_call(model: nn.Module, target: LatencyTarget, shape_CHW: tuple[int, ...]) -> Call:
    """A call that runs a copy of `model`, evaluating, in the target's dtype, on `target.batch` images.

    Raises:
        UserError: torch.compile cannot take the model, or cannot work here.
    """
    dtype = getattr(torch, target.dtype)
    ready = copy.deepcopy(model).to(target.device, dtype).eval()
    if target.runtime == "torch_compile":
        ready = cast(nn.Module, torch.compile(ready))
    images = random_images((target.batch, *shape_CHW)).to(target.device, dtype)  # type: ignore[arg-type]

    def call() -> Tensor:
        with torch.inference_mode():
            output: Tensor = ready(images)
        return output

    if target.runtime == "torch_compile":
        try:
            with torch_threads(target.threads):
                call()
        except Exception as error:  # its compilers raise many kinds
            raise UserError(
                f"latency target is {str(target)!r}; torch.compile fails on this {type(model).__name__} "
                f"({first_line(error)}). Use torch, or install a C++ compiler that works."
            ) from error
    return call


def synchronizer(target: LatencyTarget) -> Callable[[], None]:
    """What waits until the target's device has finished; nothing to wait for on a CPU."""
    if not target.device.startswith("cuda"):
        return lambda: None
    device = torch.device(target.device)
    return lambda: torch.cuda.synchronize(device)


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Run with `threads` CPU threads in torch, and put the former number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reference_call(target: LatencyTarget) -> Call:
    """The fixed workload on the target's runtime and device; one image, and float32 in ONNX Runtime."""
    if target.runtime not in RUNS_ONNX:
        return _torch_reference(target)
    single = LatencyTarget(runtime=target.runtime, threads=target.threads, device=target.device)
    return file_call(_reference_file(), single, (_CHANNELS, _SIDE, _SIDE))


def _torch_reference(target: LatencyTarget) -> Call:
    dtype = getattr(torch, target.dtype)
    kernel, matrix = (torch.from_numpy(w).to(target.device, dtype) for w in _reference_weights())
    images = random_images((1, _CHANNELS, _SIDE, _SIDE)).to(target.device, dtype)

    def call() -> Tensor:
        with torch.inference_mode():
            return nn.functional.conv2d(images, kernel, padding=1).flatten(2) @ matrix

    return call


def _reference_file() -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    kernel, matrix = _reference_weights()
    shape = np.array([1, _CHANNELS, _SIDE * _SIDE], dtype=np.int64)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "kernel"], ["maps"], pads=[1, 1, 1, 1]),
            helper.make_node("Reshape", ["maps", "shape"], ["rows"]),
            helper.make_node("MatMul", ["rows", "matrix"], ["logits"]),
        ],
        "reference",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, _CHANNELS, _SIDE, _SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, _CHANNELS, _WIDTH])],
        [
            numpy_helper.from_array(array, name)
            for name, array in (("kernel", kernel), ("matrix", matrix), ("shape", shape))
        ],
    )
    # An old IR version and opset, which every supported onnxruntime reads.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


def _reference_weights() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    kernel = np.sin(np.arange(_CHANNELS * _CHANNELS * 9, dtype=np.float32)).reshape(
        _CHANNELS, _CHANNELS, 3, 3
    )
    matrix = np.sin(np.arange(_SIDE * _SIDE * _WIDTH, dtype=np.float32)).reshape(_SIDE * _SIDE, _WIDTH)
    return (kernel * 0.05).astype(np.float32), (matrix * 0.05).astype(np.float32)
