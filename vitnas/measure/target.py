"""What a latency is measured on, and its text: `onnxruntime,batch=1`, `torch,batch=8,threads=2`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vitnas.errors import UserError, check_word, nearest

RUNTIMES = ("onnxruntime", "torch", "torch_compile", "openvino")
RUNS_ONNX = ("onnxruntime", "openvino")  # the others run the network itself
_TORCH = ("float32", "float16", "bfloat16")
DTYPES = {
    "onnxruntime": ("float32", "float16"),
    "torch": _TORCH,
    "torch_compile": _TORCH,
    "openvino": ("float32", "float16"),
}
EXAMPLE = "onnxruntime,batch=1,threads=1"


@dataclass(frozen=True, kw_only=True)
class LatencyTarget:
    """One way of running a Model.

    Args:
        runtime: `onnxruntime`, `torch` (eager), `torch_compile` (as `torch.compile` makes it) or `openvino`.
        batch: images per call.
        threads: CPU threads of the runtime.
        device: `cpu`, `cuda` or `cuda:N`.
        dtype: `float32`, `float16` or, in torch, `bfloat16`; of weights and images.

    `str(target)` is the text that `parse_target` reads: the runtime, the batch and what is not at its default.
    """

    runtime: str = "onnxruntime"
    batch: int = 1
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_word("latency target's runtime", self.runtime, RUNTIMES)
        for name in ("batch", "threads"):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise UserError(
                    f"latency target's {name} is {number!r}; it must be a whole number of at least 1. "
                    f"Write for example {EXAMPLE!r}."
                )
        kind, _, index = self.device.partition(":")
        if kind not in ("cpu", "cuda") or (":" in self.device and (kind == "cpu" or not index.isdigit())):
            raise UserError(
                f"latency target's device is {self.device!r}; it must be cpu, cuda or cuda:N. Mend it."
            )
        if self.runtime == "openvino" and kind != "cpu":
            raise UserError(
                f"latency target's device is {self.device!r}; openvino runs on cpu here. Use device=cpu."
            )
        if self.dtype not in DTYPES[self.runtime]:
            allowed = DTYPES[self.runtime]
            raise UserError(
                f"latency target's dtype is {self.dtype!r}; {self.runtime} takes {', '.join(allowed)}."
                f"{nearest(self.dtype, allowed)}"
            )

    def __str__(self) -> str:
        parts = [self.runtime, f"batch={self.batch}"]
        for field in fields(self):
            if field.name not in ("runtime", "batch") and getattr(self, field.name) != field.default:
                parts.append(f"{field.name}={getattr(self, field.name)}")
        return ",".join(parts)


def parse_target(text: str) -> LatencyTarget:
    """Read `runtime,field=value,...`; what is left out has its default (batch 1, 1 thread, cpu, float32).

    >>> parse_target("torch,batch=8,threads=2").threads
    2

    Raises:
        UserError: no or an unknown runtime, an unknown field, a field given twice, a value that is not allowed.
    """
    runtime, *settings = (part.strip() for part in text.split(","))
    known = [field.name for field in fields(LatencyTarget) if field.name != "runtime"]
    values: dict[str, str | int] = {}
    for setting in settings:
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or not value:
            raise UserError(
                f"latency target {text!r} has the part {setting!r}; after the runtime, each part is "
                f"field=value. Write for example {EXAMPLE!r}."
            )
        if name not in known:
            raise UserError(
                f"latency target {text!r} has no field {name!r}; it has {', '.join(known)}."
                f"{nearest(name, known)}"
            )
        if name in values:
            raise UserError(f"latency target {text!r} gives {name} twice; leave one out.")
        values[name] = int(value) if name in ("batch", "threads") and value.isdecimal() else value
    return LatencyTarget(runtime=runtime, **values)  # type: ignore[arg-type]
