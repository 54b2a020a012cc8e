"""What the tracing exporter needs spelled differently gives the same numbers, and the file loads."""

from pathlib import Path

import onnx
import pytest
import torch

from vitnas.arch import Arch, Block, Stage
from vitnas.measure import LatencyTarget
from vitnas.measure.convert import convert, random_images
from vitnas.measure.onnx_spelling import OnnxSpelling, einsum_as_matmul
from vitnas.measure.runtimes import onnx_session
from vitnas.model import build


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("ij,jk->ik", (2, 3), (3, 4)),
        ("bxrck,rjk->bxrcj", (2, 3, 4, 5, 6), (4, 7, 6)),
        ("bxrck,cjk->bxrcj", (2, 3, 4, 5, 6), (5, 7, 6)),
        ("abc,bcd->da", (2, 3, 4), (3, 4, 5)),
        ("a, a ->", (3,), (3,)),
    ],
)
def test_einsum_as_a_matrix_product_is_equal(
    equation: str, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in (left, right))
    torch.testing.assert_close(einsum_as_matmul(equation, a, b), torch.einsum(equation, a, b))


@pytest.mark.parametrize("equation", ["ij,ij->ij", "ij,jk->k", "ii,ij->j", "ij,jk", "...j,jk->...k"])
def test_other_einsums_stay_as_they_are(equation: str) -> None:
    a = torch.arange(9.0).reshape(3, 3)
    want = torch.einsum(equation, a, a)
    with OnnxSpelling():
        torch.testing.assert_close(torch.einsum(equation, a, a), want)


def test_relative_positions_can_be_traced(tmp_path: Path) -> None:
    blocks = (Block(num_heads=2, head_dim=8, mlp_hidden=16),) * 2
    arch = Arch(
        image_size=16, patch_size=4, stages=(Stage(embed_dim=16, blocks=blocks),), relative_position=2
    )
    model, images = build(arch).eval(), random_images((1, 3, 16, 16))
    path = tmp_path / "model.onnx"
    convert(model, path, images, exporter="legacy", dynamic_batch=False)
    logits = onnx_session(path, LatencyTarget()).run(None, {"input": images.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-5)
    assert "Einsum" not in {node.op_type for node in onnx.load(str(path)).graph.node}
