"""ExecuTorch: a `.pte` file for phones and boards, by XNNPACK, which runs in ExecuTorch's runtime alone.

It takes one image at a time: its memory is planned when it is written, for the largest input. So sides are bounded,
too; larger images are for their reader to make smaller. What other files keep as metadata is the constant method
`about`.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from torch import Tensor, nn

from vitnas.errors import MissingExtra, first_line
from vitnas.exporting.pixels import other_size
from vitnas.exporting.torch_export import SIDES, Shown, trace
from vitnas.exporting.verify import ExportError, Run, traced_images
from vitnas.measure.convert import quiet
from vitnas.measure.latency import LatencyMeter
from vitnas.measure.runtimes import onnx_session
from vitnas.measure.target import LatencyTarget
from vitnas.runs import write_with
from vitnas.version import VERSION

LONGEST = 1024  # pixels of a side, for which memory is planned
ABOUT, MAX_SIDE = "about", "max_side"


def require_executorch() -> None:
    """Raise MissingExtra where ExecuTorch is not installed."""
    if find_spec("executorch") is None:
        raise MissingExtra("an ExecuTorch file", "executorch")


def export_executorch(
    model: nn.Module,
    path: Path | str,
    images: Tensor | None = None,
    *,
    tolerance: float | None = None,
    class_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    pixels: bool = False,
) -> dict[str, Any]:
    """Write `model` as a `.pte` file, run it in ExecuTorch and compare it with the Model.

    It takes one image at a time: with `pixels` uint8 (1, H, W, C) of any height and width up to 1,024 pixels (or three
    times the network's own, where that is more), and gives probabilities; else prepared, and gives logits. Other
    arguments as in `export_onnx`.

    Returns:
        The record: path, bytes, parameter counts, agreement, problems in words.

    Raises:
        MissingExtra: ExecuTorch is not installed.
        ExportError: it cannot take the model, or the file computes something else. A file that was at `path` before is
            untouched.
        UserError: wrong images or class names; `path` cannot be written.
    """
    require_executorch()
    path, started = Path(path), time.perf_counter()
    shown = Shown.of(model, images, pixels=pixels, class_names=class_names, data_config=data_config)
    traced = traced_images(other_size(shown.examples) if pixels else shown.examples, dynamic_batch=False)
    longest = max(LONGEST, *traced.shape[1:3])
    program = trace(shown.network, traced, SIDES if pixels else {}, longest=longest)
    about = {**shown.properties, **({MAX_SIDE: str(longest)} if pixels else {})}
    with tempfile.TemporaryDirectory(prefix="vitnas-export-") as folder:
        file = Path(folder) / "model.pte"
        try:
            file.write_bytes(_lowered(program, json.dumps(about)))
            run = executorch_runner(file)
        except Exception as error:  # its passes raise many kinds
            raise ExportError(
                f"ExecuTorch cannot take this {type(model).__name__}: {first_line(error)}."
            ) from error
        agreement = shown.verify(run, "the ExecuTorch file", tolerance, dynamic_batch=False)
        write_with(path, partial(copyfile, file))
    return {
        **shown.record(path, model, program, agreement, dynamic_batch=False),
        "problems": [
            *shown.problems,
            "It takes one image at a time" + (f", of up to {longest} pixels a side." if pixels else "."),
        ],
        "seconds": round(time.perf_counter() - started, 3),
        "versions": {
            "torch": str(torch.__version__),
            "executorch": metadata.version("executorch"),
            "vitnas": VERSION,
        },
    }


def _lowered(program: torch.export.ExportedProgram, about: str) -> bytes:
    """The program as ExecuTorch runs it, by XNNPACK where that has the operators."""
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        edge = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()], constant_methods={ABOUT: about}
        )
        return bytes(edge.to_executorch().buffer)


def executorch_runner(file: Path | str) -> Run:
    """A function from images, as the file takes them, to its (B, Y) answers, one image after the other."""
    program = _program(file)
    method = program.load_method("forward")

    def run(images: Tensor, _kept: Any = program) -> Tensor:  # a method does not keep its program
        return torch.cat([method.execute([part.cpu().contiguous()])[0] for part in images.split(1)])

    return run


def executorch_about(file: Path | str) -> str:
    """JSON: what a file that vitnas wrote says of itself; `{}` of any other."""
    program = _program(file)
    return str(program.load_method(ABOUT).execute([])[0]) if ABOUT in program.method_names else "{}"


def _program(file: Path | str) -> Any:
    require_executorch()
    with quiet():
        from executorch.runtime import Runtime

        return Runtime.get().load_program(str(file))


def timed_beside(file: Path, onnx: Path, shape_BHWC: tuple[int, ...]) -> tuple[dict[str, float], int]:
    """Milliseconds for one image by a `.pte` and an ONNX file, both of pixels, in the same rounds; on how many threads.

    These are ExecuTorch's, whose number cannot be changed while one of its programs is loaded.
    """
    with quiet():
        from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count

        target = LatencyTarget(threads=_threadpool_get_thread_count())
    images_BHWC = torch.randint(
        256, shape_BHWC, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    run, session = executorch_runner(file), onnx_session(onnx, target)
    feed = {session.get_inputs()[0].name: images_BHWC.numpy()}
    found = LatencyMeter(target).compare_calls(
        {"executorch": lambda: run(images_BHWC), "onnxruntime": lambda: session.run(None, feed)},
        (shape_BHWC[1], shape_BHWC[2]),
    )
    return {name: latency.median_ms for name, latency in found.items()}, target.threads
