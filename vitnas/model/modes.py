"""Networks in evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Put `networks` in evaluation mode, and afterwards each of their modules back in the mode that it had."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    of_networks = [network.training for network in networks]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for network, training in zip(networks, of_networks, strict=True):
            network.train(training)  # a Supernet takes note, for the networks that it keeps
        for module, training in modes:
            module.training = training
