"""extract: from a Supernet and an Arch to a Model of its own. The hinge between searching and using."""

from __future__ import annotations

import torch

from vitnas.arch import Arch
from vitnas.layers.axes import named_tensors
from vitnas.model import Model, build
from vitnas.model.timm_cfg import copy_data_cfg
from vitnas.supernet import Supernet, select


def extract(supernet: Supernet, arch: Arch, *, drop_path: float = 0.0) -> Model:
    """The Model of `arch` with a copy of the Supernet's weights; without gradients both give the same bits.

    Args:
        drop_path: stochastic depth for further training.

    Raises:
        UserError: `arch` is not in the Supernet's Space.
    """
    like = next(supernet.parameters())
    model = build(arch, drop_path=drop_path, device="meta").to(like.dtype).to_empty(device=like.device)
    weights = select(supernet, arch)
    with torch.no_grad():  # not load_state_dict, which leaves out buffers that are not saved
        for name, tensor in named_tensors(model).items():
            tensor.copy_(weights[name])
    copy_data_cfg(supernet, model)
    return model.train(supernet.training)
