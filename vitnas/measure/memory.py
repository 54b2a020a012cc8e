"""Peak memory of a forward pass, measured from the tensors that are alive.

The second opinion on the analytic count of an Arch. What is counted: the largest total size of storages alive
at once after any operation, where a storage counts from the operation that returned it until nothing refers
to it. Views count once. Parameters, buffers and the input images do not count, nor what a kernel allocates
and frees inside itself.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitnas.errors import UserError
from vitnas.layers.axes import named_tensors
from vitnas.measure.convert import model_device, model_dtype
from vitnas.model.modes import evaluating


def peak_activation_bytes(
    model: nn.Module, image_shape: Sequence[int], batch: int = 1, *, device: str | None = "meta"
) -> int:
    """Bytes of activations alive at once, at most, in one forward pass without gradients in evaluation mode.

    Args:
        image_shape: channels, height, width.
        batch: images in the pass.
        device: `meta` computes nothing and takes milliseconds; attention is taken to run fused, as it does on
            a CPU. None runs on the model's own device with real numbers, whatever kernels it has.

    Raises:
        UserError: the image shape is not three sizes.
    """
    if len(image_shape) != 3 or batch < 1:
        raise UserError(
            f"image_shape is {tuple(image_shape)} and batch {batch}; they must be "
            "(channels, height, width) and at least 1. Mend them."
        )
    where = torch.device(device) if device else model_device(model)
    images = torch.zeros((batch, *image_shape), device=where, dtype=model_dtype(model))
    tensors = named_tensors(model)
    if where != model_device(model):
        tensors = {name: torch.empty_like(tensor, device=where) for name, tensor in tensors.items()}
    fused = _FusedAttention() if where.type == "meta" else contextlib.nullcontext()
    with torch.no_grad(), evaluating(model), fused, _LiveStorages([images, *tensors.values()]) as live:
        functional_call(model, tensors, (images,))
    peak: int = live.peak
    return peak


def peak_bytes_of(module: nn.Module, given: Tensor, call: Callable[[], object]) -> int:
    """Bytes of activations and gradients alive at once, at most, while `call` runs `module` on `given`.

    On a GPU what the allocator handed out beyond what was held before.
    """
    for parameter in module.parameters():
        parameter.grad = None  # those of an earlier call would count as held before
    if given.is_cuda:
        where = given.device  # which need not be the current one
        torch.cuda.synchronize(where)
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where)
        call()
        torch.cuda.synchronize(where)
        return int(torch.cuda.max_memory_allocated(where) - before)
    with _LiveStorages([given, *module.parameters(), *module.buffers()]) as live:
        call()
    return int(live.peak)


class _LiveStorages(TorchDispatchMode):
    """Follows the storages that operations return. After each operation the dead ones are swept out."""

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignored}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        # Swept before adding: a new storage may lie at the address of a dead one.
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor):
                storage = output.untyped_storage()
                if storage._cdata not in self._ignored:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return outputs


class _FusedAttention(TorchFunctionMode):
    """Sends attention to the CPU's fused kernel, which on the meta device torch would spell out with N x N weights."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and len(args) == 3 and args[0].dim() == 4:
            options = {name: kwargs[name] for name in ("is_causal", "attn_mask", "scale") if name in kwargs}
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **options)[0]
        return func(*args, **kwargs)


def peak_process_bytes() -> int:
    """The most memory (resident set) that this process has ever held, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # there is none there

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024  # macOS counts bytes, Linux KiB
