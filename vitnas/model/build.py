"""build(arch): an initialised Model, or on the meta device one without storage, for counting and borrowed weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import LayerScale
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitnas.arch import Arch
from vitnas.mixers import Mixer
from vitnas.model.vit import Model


def build(
    arch: Arch,
    *,
    drop_path: float | Sequence[float] = 0.0,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Model:
    """The Model of `arch`, initialised.

    Linear weights, class token and positions are drawn from a normal distribution of standard deviation 0.02 cut at
    two deviations, biases are 0 (DeiT's and AutoFormer's rule, AutoFormer section 5); convolutions keep torch's rule.

    Args:
        drop_path: rate of stochastic depth at the last block, or one rate per block.
        device: where the parameters live (None: where torch makes tensors, as `with torch.device(...)` says); "meta"
            for counting without memory (nothing is initialised then).
        generator: source of the random weights; torch's global one when None.
    """
    where = torch.get_default_device() if device is None else torch.device(device)
    if where.type == "meta":
        with storage_free():
            return Model(arch, drop_path=drop_path)
    with where:
        model = Model(arch, drop_path=drop_path)
        initialize(model, generator)
    return model


@contextmanager
def storage_free() -> Iterator[None]:
    """Modules made inside have no storage and no initial values, which torch would go through drawing all the same."""
    with torch.device("meta"), _NoValues():
        yield


class _NoValues(TorchFunctionMode):
    """Leaves out what only fills tensors. A mode, unlike a patched class, holds for its own thread alone."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in FILLS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


FILLS = {nn.init.kaiming_uniform_, nn.init.uniform_, Tensor.fill_, Tensor.zero_, Tensor.uniform_}


@torch.no_grad()
def initialize(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Initialise all weights of `model`, in the order of `named_modules` (so a seed fixes them)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5, generator=generator)
            if module.bias is not None:
                bound = (module.weight[0].numel()) ** -0.5
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, module.init_values)
        else:
            for parameter in module.parameters(recurse=False):  # class token, positions, relative tables
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
        if isinstance(module, Mixer):
            module.initialize_own(generator)
