"""CvT's convolutional projections: the paper's formula, exact costs, odd sides, strides, export, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional

from vitnas.errors import UserError
from vitnas.exporting import export_onnx
from vitnas.mixers import MIXERS
from vitnas.model.conv_projection import ConvProjection
from vitnas.model.convolutional import ConvXformer, cv, levi
from vitnas.testing import randomize_
from vitnas.testing.flops import counted_macs, random_input

DIM, HEADS, HEAD_DIM = 12, 3, 4


def made(word: str, kv_stride: int) -> Any:
    kind: Any = MIXERS[word]
    module = ConvProjection(kind(DIM, HEADS, head_dim=HEAD_DIM, size=None), kv_stride=kv_stride)
    generator = torch.Generator().manual_seed(0)
    randomize_(module, generator)
    module.mixer.initialize_own(generator)
    for name, buffer in module.named_buffers():
        if "running_var" in name:
            buffer.uniform_(0.5, 2.0, generator=generator)
        elif "running_mean" in name:
            buffer.normal_(generator=generator)
    return module.double().eval()


def projected(module: Any, name: str, x_BCHW: Tensor) -> Tensor:
    """Equation (2) of the paper one pixel at a time: (B, n, A x K)."""
    conv, norm = module.get_submodule(f"conv_{name}"), module.get_submodule(f"norm_{name}")
    place, stride = "qkv".index(name) * HEADS * HEAD_DIM, conv.stride[0]
    weight = module.mixer.qkv.weight[place : place + HEADS * HEAD_DIM]
    bias = module.mixer.qkv.bias[place : place + HEADS * HEAD_DIM]
    padded = functional.pad(x_BCHW, (1, 1, 1, 1))
    rows = []
    for top in range(0, x_BCHW.shape[2], stride):
        for left in range(0, x_BCHW.shape[3], stride):
            near = padded[:, :, top : top + 3, left : left + 3]
            pixel = (near * conv.weight[:, 0]).sum((2, 3))
            pixel = (pixel - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
            rows.append((pixel * norm.weight + norm.bias) @ weight.t() + bias)
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize(
    ("word", "kv_stride"), [("softmax", 1), ("softmax", 2), ("performer", 3), ("nystrom", 1)]
)
@pytest.mark.parametrize(("rows", "cols"), [(5, 5), (4, 7)])
def test_it_is_the_papers_formula(word: str, kv_stride: int, rows: int, cols: int) -> None:
    module, x = made(word, kv_stride), random_input((2, DIM, rows, cols), dtype=torch.float64)
    q, k, v = (projected(module, name, x).unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2) for name in "qkv")
    assert k.shape[2] == -(-rows // kv_stride) * -(-cols // kv_stride)
    if word == "softmax":
        out = (q @ k.transpose(2, 3) * HEAD_DIM**-0.5).softmax(-1) @ v
    else:
        out = module.mixer.core(q, k, v)  # whose own equations have their own tests
    want = out.transpose(1, 2).flatten(2) @ module.mixer.proj.weight.t() + module.mixer.proj.bias
    torch.testing.assert_close(module(x), want, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(module(x)[1:], module(x[1:]), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("letter", "kv_stride", "side"), [("t", 1, 16), ("t", 2, 18), ("p", 2, 16), ("n", 1, 10)]
)
def test_costs_are_the_linear_ones_plus_the_convolutions(letter: str, kv_stride: int, side: int) -> None:
    """Four blocks of 128 channels on a map of half the side. Keys that are left out save their share."""
    linear, conv = cv(letter), cv(letter, projection="conv", kv_stride=kv_stride)
    params = [sum(parameter.numel() for parameter in model.parameters()) for model in (linear, conv)]
    assert params[1] - params[0] == 4 * 3 * (9 + 2) * 128
    macs = [counted_macs(model.eval(), (1, 3, side, side)) for model in (linear, conv)]
    tokens, keys = (side // 2) ** 2, (-(-side // 2 // kv_stride)) ** 2
    gone = tokens - keys
    per_key = {"t": 2 * tokens * 128, "p": 2 * 110 * 128 + 110 * 4, "n": 0}[letter] + 2 * 128 * 128
    assert macs[1] - macs[0] == 4 * (9 * 128 * (tokens + 2 * keys) - gone * per_key)


@pytest.mark.parametrize(
    ("name", "kv_stride"),
    [("vix_cvt", 2), ("vix_cvp", 2), pytest.param("vix_cvn", 1, marks=pytest.mark.slow)],
)
def test_models_learn_and_export(name: str, kv_stride: int, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=5, img_size=18, projection="conv", kv_stride=kv_stride)
    images = random_input((3, 3, 18, 18))  # a map of 9 x 9
    model(images).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    model.eval()
    assert model(torch.zeros(1, 3, 24, 20)).shape == (1, 5)
    record = export_onnx(model, tmp_path / "model.onnx", images, exporter="legacy")
    assert record["max_abs_diff"] < 1e-4


def test_named_models_keep_the_authors_linear_projections() -> None:
    for model in (cv("t"), levi("p")):
        assert not any(isinstance(module, ConvProjection) for module in model.modules())
    assert any(isinstance(module, ConvProjection) for module in levi("p", projection="conv").modules())


@pytest.mark.parametrize(
    ("letter", "options", "sentence"),
    [
        ("n", {"projection": "conv", "kv_stride": 2}, r"kv_stride is 2 and mixer 'nystrom'; .* Use kv_stride=1"),
        ("t", {"projection": "conv", "kv_stride": 0}, r"kv_stride is 0; it must be at least 1\. Nearest: 1"),
        ("t", {"kv_stride": 2}, r"only convolutions have a stride\. Use projection='conv'"),
        ("t", {"projection": "convv"}, r"projection is 'convv'; .* Nearest: 'conv'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(letter: str, options: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        cv(letter, **options)


def test_a_mixer_without_queries_is_refused() -> None:
    with pytest.raises(UserError, match=r"projection is 'conv' and mixer 'fourier'; .* Use projection='lin"):
        ConvXformer("x", "fourier", [(((8, 2),), 1)], norms=True, projection="conv")
