"""The convolutional stem: what it computes, other patches, and images of another size."""

from __future__ import annotations

import pytest
import torch
from timm.layers import resample_patch_embed
from torch.nn import functional

from vitnas.errors import UserError
from vitnas.layers.stem import ConvStem
from vitnas.testing import randomize_


@pytest.fixture
def stem(generator: torch.Generator) -> ConvStem:
    made = ConvStem((16, 16), 4, 3, 10, 5).eval()
    randomize_(made, generator)
    return made


def test_it_is_the_papers_formula(stem: ConvStem) -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def unit(x: torch.Tensor, index: int, stride: int) -> torch.Tensor:
        conv, norm = stem.get_submodule(f"conv{index}"), stem.get_submodule(f"norm{index}")
        x = functional.conv2d(x, conv.weight, stride=stride, padding=1)
        mean, var = norm.running_mean[:, None, None], norm.running_var[:, None, None]
        x = (x - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
        return x.clamp(min=0)

    u1 = unit(images, 1, 2)
    u3 = unit(unit(u1, 2, 1), 3, 1)
    patches = (u1 + u3).unfold(2, 2, 2).unfold(3, 2, 2)  # half of the patch, as the image is halved
    want = torch.einsum("bcyxhw,dchw->byxd", patches, stem.proj.weight) + stem.proj.bias
    torch.testing.assert_close(stem(images), want, rtol=1e-4, atol=1e-5)
    assert want.shape == (2, 4, 4, 10)


def test_patches_of_another_size_are_resampled(stem: ConvStem) -> None:
    bias, want = stem.proj.bias.detach().clone(), resample_patch_embed(stem.proj.weight.detach(), [4, 4])
    stem.set_input_size((32, 32), 8)
    assert stem.proj.weight.shape == (10, 5, 4, 4)
    assert stem(torch.randn(1, 3, 32, 32)).shape == (1, 4, 4, 10)
    torch.testing.assert_close(
        (stem.proj.weight.detach(), stem.proj.bias.detach()), (want, bias), rtol=0, atol=0
    )


def test_images_of_another_size_are_refused(stem: ConvStem) -> None:
    with pytest.raises(
        UserError, match=r"the images are \(20, 20\); the model takes 16 x 16 pixels\. Resize them"
    ):
        stem(torch.randn(1, 3, 20, 20))
