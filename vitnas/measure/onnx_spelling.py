"""Spells operations so that both of torch's ONNX exporters write graphs that load and run fast."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitnas.layers.relative_position import summed_entries


class OnnxSpelling(TorchFunctionMode):
    """While it is active, three operations take another form with the same result.

    - `repeat_interleave` gets its dimension counted from the front. The tracing exporter (torch 2.15) adds the rank to
      a negative one in place, and with it to every other -1 of the graph; such files do not load.
    - `einsum` of two tensors becomes a matrix product. As ONNX's Einsum it runs slower in ONNX Runtime than what the
      current exporter writes (a sixth, for a whole ViT with relative positions).
    - `summed_entries` of relative positions becomes a matrix product. ONNX Runtime adds to scattered places in float32
      alone, so that no file that does can be made float16.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.repeat_interleave, Tensor.repeat_interleave) and (kwargs.get("dim") or 0) < 0:
            kwargs["dim"] += args[0].dim()
        if func is torch.einsum and len(args) == 3 and _is_product(args[0]):
            return einsum_as_matmul(*args)
        if func is summed_entries:
            return entries_as_matmul(*args)
        return func(*args, **kwargs)


def einsum_as_matmul(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """`torch.einsum(equation, a, b)` by permuting, one batched matrix product, and permuting back."""
    left, right, out = _letters(equation)
    sizes = dict(zip(left + right, (*a.shape, *b.shape), strict=True))
    batch = [i for i in left if i in right and i in out]
    summed = [i for i in left if i in right and i not in out]
    rows, cols = [i for i in left if i not in right], [i for i in right if i not in left]
    a = a.permute([left.index(i) for i in (*batch, *rows, *summed)])
    b = b.permute([right.index(i) for i in (*batch, *summed, *cols)])
    # Sizes are left to -1 where they can be: arithmetic on a dynamic batch size ends up as operations in the file.
    depth = prod(sizes[i] for i in summed)
    a = a.reshape([*(sizes[i] for i in batch), -1, depth])
    b = b.reshape([*(sizes[i] for i in batch), depth, prod(sizes[i] for i in cols)])
    order = (*batch, *rows, *cols)
    first = order[len(batch)] if rows else None
    product = (a @ b).reshape([-1 if i == first else sizes[i] for i in order])
    return product.permute([order.index(i) for i in out])


def entries_as_matmul(lines_BANF: Tensor, index: Tensor, table_TK: Tensor) -> Tensor:
    """`summed_entries` by a batched matrix product with the table's entries in their places."""
    if index.dim() == 2:
        _, heads, tokens, lines = lines_BANF.shape
        rows = lines_BANF.permute(2, 0, 1, 3).reshape(tokens, -1, lines) @ table_TK[index]
        return rows.reshape(tokens, -1, heads, table_TK.shape[1]).permute(1, 2, 0, 3)
    return (lines_BANF.permute(0, 2, 1, 3) @ table_TK[index[:, 0]]).permute(0, 2, 1, 3)


def _is_product(equation: Any) -> bool:
    """Two operands without ellipsis or repeated letters, something summed, nothing summed in one operand alone."""
    if not isinstance(equation, str) or "." in equation or equation.count(",") != 1 or "->" not in equation:
        return False
    left, right, out = _letters(equation)
    distinct = all(len(set(letters)) == len(letters) for letters in (left, right, out))
    return distinct and set(left) ^ set(right) <= set(out) and bool(set(left) & set(right) - set(out))


def _letters(equation: str) -> tuple[str, str, str]:
    operands, out = equation.replace(" ", "").split("->")
    left, right = operands.split(",")
    return left, right, out
