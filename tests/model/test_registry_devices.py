"""device= and dtype= of timm.create_model, and `with torch.device(...)` around it, as for timm's own models."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

import vitnas  # noqa: F401 - registers the models
from vitnas.model.published import PUBLISHED
from vitnas.model.registry_xformers import SWAPPED
from vitnas.space import autoformer

ARCH = autoformer("micro", image_size=16, patch_size=4, num_classes=5).smallest()
CONVOLUTIONAL = ("vix_fnet2d", "vix_levin", "vix_levip", "vix_levit", "vix_cvn", "vix_cvp", "vix_cvt")
NAMES = (
    *("vit_tiny_patch16_224", "vitnas_arch", *PUBLISHED, *CONVOLUTIONAL),
    *(
        pytest.param(name, marks=() if name in ("pip_ti_224", "levin_128s") else pytest.mark.slow)
        for name in SWAPPED
    ),
)
# As small as they get, of every kind: images of a CPU in half precision take their time.
SMALL: dict[str, dict[str, Any]] = {
    "autoformer_tiny": {"img_size": 32},
    "vit_resnas_tiny": {"img_size": 112},
    "vitas_e": {"img_size": 32},
    **{
        name: {}
        for name in ("vitnas_arch", "vix_vip", "vix_hybrid_vil_rope", "vix_mixer", "vix_fnet", "vix_ccn")
    },
    **{name: {} for name in ("vix_fnet2d", "vix_levin", "vix_cvp", "pin_ti_224", "levip_128s")},
}


def made(name: str, **options: Any) -> Any:
    return timm.create_model(name, **options, **({"arch": ARCH} if name == "vitnas_arch" else {})).eval()


def check(model: Any, device: str, dtype: torch.dtype) -> None:
    """Everything lies there in that type, and images there go through."""
    for tensor in (*model.parameters(), *model.buffers()):
        assert tensor.device.type == device
        assert tensor.dtype == dtype or not tensor.is_floating_point()
    images = torch.ones(2, *model.pretrained_cfg["input_size"], device=device, dtype=dtype)
    with torch.no_grad():
        logits = model(images)
    assert (logits.device.type, logits.dtype, tuple(logits.shape)) == (device, dtype, (2, model.num_classes))
    assert device == "meta" or bool(logits.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_without_storage(name: str) -> None:
    with torch.device("meta"):
        check(made(name), "meta", torch.float32)
    check(made(name, device="meta", dtype=torch.bfloat16), "meta", torch.bfloat16)


@pytest.mark.parametrize("name", SMALL)
def test_half_precision(name: str) -> None:
    sizes = SMALL[name]
    check(made(name, dtype=torch.bfloat16, **sizes), "cpu", torch.bfloat16)
    with torch.device("meta"):  # what is asked for by name comes before what torch is told
        check(made(name, device="cpu", **sizes), "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL)
def test_on_a_gpu(name: str) -> None:
    with torch.device("cuda"):
        check(made(name, **SMALL[name]), "cuda", torch.float32)
    check(made(name, device="cuda", dtype=torch.bfloat16, **SMALL[name]), "cuda", torch.bfloat16)


@pytest.mark.parametrize("name", ["autoformer_tiny", "vitnas_arch", "vix_cvn"])
def test_the_same_weights_in_any_type(name: str) -> None:
    """One seed gives the same numbers, rounded."""
    tables = []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        tables.append(made(name, dtype=dtype).state_dict())
    for key, tensor in tables[0].items():
        torch.testing.assert_close(tables[1][key], tensor.to(tables[1][key].dtype), rtol=0, atol=0)
