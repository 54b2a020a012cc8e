"""Random weights for tests: what starts at 0 or 1 would hide a wrong slice."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def randomize_(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Give every parameter and running statistic of `module` random values that keep activations of a reasonable size.

    Norm weights are drawn around 1, matrices by the size of their input, everything else around 0.
    """
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:
            parameter.normal_(1.0 if name.endswith(".weight") else 0.0, 0.3, generator=generator)
        else:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0.0, 0.3, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)
