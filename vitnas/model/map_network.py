"""What networks that work on maps have in common: the mean over the map, a linear head, and timm's interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class MapNetwork(nn.Module):
    """A network whose `forward_features` gives a map; with timm's interface as far as it goes."""

    def end(
        self, name: str, dim: int, num_classes: int, input_size: tuple[int, int, int], *, first_conv: str
    ) -> None:
        """Make the head and what timm wants to know; called where everything before is made."""
        self.num_classes, self.num_features = num_classes, dim
        self.head: nn.Module = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.pretrained_cfg: dict[str, Any] = {
            "architecture": name,
            "num_classes": num_classes,
            "input_size": input_size,
            "mean": (0.5,) * input_size[0],
            "std": (0.5,) * input_size[0],
            "first_conv": first_conv,
            "classifier": "head",
        }
        self.default_cfg = self.pretrained_cfg

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, Y) logits."""
        return self.forward_head(self.forward_features(images_BCHW))

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) images to a (B, D, H, W) map."""
        raise NotImplementedError

    def forward_head(self, x_BDHW: Tensor, pre_logits: bool = False) -> Tensor:
        """A map to (B, Y) logits, or to (B, D) pooled features."""
        pooled = x_BDHW.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes` (0: none)."""
        like = next(self.parameters())
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes).to(like) if num_classes else nn.Identity()
