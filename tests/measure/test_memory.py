"""Peak activation memory: counted by hand on small networks, and equal on the meta device and on the CPU."""

import psutil
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitnas.errors import UserError
from vitnas.measure import peak_activation_bytes, peak_process_bytes


class Steps(nn.Module):
    """Two doublings; what is alive at once depends on whether the first result is kept."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep = keep
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        kept = images * self.scale
        hidden = torch.cat([kept, kept], dim=1)
        if not self.keep:
            del kept
        hidden = torch.cat([hidden, hidden], dim=1)
        return hidden.flatten(1)[:, :1] + (kept.sum() if self.keep else 0)


@pytest.mark.parametrize("device", ["meta", None])
@pytest.mark.parametrize("batch", [1, 3])
def test_peak_is_the_largest_sum_of_live_storages(device: str | None, batch: int) -> None:
    image = 4 * 3 * 5 * 5 * batch
    # First result (if kept), its doubling and its quadrupling; views cost nothing.
    assert peak_activation_bytes(Steps(keep=False), (3, 5, 5), batch, device=device) == (2 + 4) * image
    assert peak_activation_bytes(Steps(keep=True), (3, 5, 5), batch, device=device) == (1 + 2 + 4) * image


def test_weights_images_and_views_do_not_count() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 3, 4, 4))

        def forward(self, images: Tensor) -> Tensor:
            return self.weight.expand(len(images), -1, -1, -1) if images.flatten(1).shape[0] else images

    assert peak_activation_bytes(Views(), (3, 4, 4)) == 0


def test_meta_device_and_cpu_agree_on_a_vit_and_batch_scales() -> None:
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
    meta = peak_activation_bytes(model, (3, 32, 32))
    assert meta == peak_activation_bytes(model, (3, 32, 32), device=None)
    assert peak_activation_bytes(model, (3, 32, 32), 8) == 8 * meta
    # Block input, residual, normed input and the MLP's two hidden tensors are alive in the MLP.
    assert meta >= 4 * 17 * (3 * 48 + 2 * 192)
    assert model.training
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_model_on_the_meta_device_can_be_asked() -> None:
    with torch.device("meta"):
        model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
    assert peak_activation_bytes(model, (3, 32, 32)) > 0


def test_a_wrong_shape_is_refused() -> None:
    with pytest.raises(UserError, match=r"image_shape is \(3, 5\) and batch 1; they must be"):
        peak_activation_bytes(Steps(keep=True), (3, 5))


def test_process_peak_grows_with_what_is_held() -> None:
    before = peak_process_bytes()
    free = before - psutil.Process().memory_info().rss
    held = torch.ones((free + 2**26) // 4)  # float32: more bytes than were ever held
    assert peak_process_bytes() > before
    assert before > 2**20
    del held
