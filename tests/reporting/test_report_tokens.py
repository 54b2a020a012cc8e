"""Pictures of the patches kept: the page, what is dark and what is of one colour, and the command."""

from __future__ import annotations

import base64
import io
import re
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitnas.arch import Arch, Block, Stage
from vitnas.cli import main
from vitnas.errors import UserError
from vitnas.exporting import save_timm
from vitnas.model import Model, build
from vitnas.reporting.tokens import TokenMaps, draw_tokens, token_maps
from vitnas.testing import randomize_

BLOCK = Block(num_heads=2, head_dim=8, mlp_hidden=16)


def model_of(selector: str | None, *keeps: int | None) -> Model:
    blocks = tuple(replace(BLOCK, keep=keep) for keep in keeps)
    arch = Arch(
        image_size=(16, 24),
        patch_size=4,
        num_classes=3,
        stages=(Stage(embed_dim=16, blocks=blocks),),
        selector=selector,
    )
    model = build(arch)
    randomize_(model, torch.Generator().manual_seed(0))
    return model.eval()


def maps_of(model: Model) -> TokenMaps:
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    return token_maps(model, images, ["a.png", "<b>.png"], mean=(0.5,) * 3, std=(0.5,) * 3)


def covered(page: str) -> float:
    """Patches under dark or coloured rectangles, in all."""
    sizes = re.findall(r'<rect [^>]*width="([\d.]+)" height="([\d.]+)"', page)
    return sum(float(width) * float(height) for width, height in sizes) / (224 / 6) ** 2


def test_what_is_gone_is_dark(tmp_path: Path) -> None:
    maps = maps_of(model_of("fixed", None, 13, 5))
    assert (maps.blocks, maps.keeps, maps.grid) == ((1, 2), (13, 5), (4, 6))
    for image in maps.images:
        assert [sum(place < 0 for place in places) for places in image.groups] == [11, 19]
    page = draw_tokens(maps)
    assert covered(page) == pytest.approx(2 * (11 + 19), rel=0.02)
    assert "&lt;b&gt;.png" in page
    assert "hsl(" not in page
    maps.write(tmp_path)
    assert TokenMaps.read(tmp_path) == maps


def test_what_is_in_one_token_has_one_colour() -> None:
    maps = maps_of(model_of("merge", None, 9))
    page = draw_tokens(maps)
    shared = [
        sum(places.count(place) > 1 for place in places) for image in maps.images for places in image.groups
    ]
    assert covered(page) == pytest.approx(sum(shared), rel=0.02)
    assert "#000" not in page
    colours = {
        place for image in maps.images for place in image.groups[0] if image.groups[0].count(place) > 1
    }
    assert len(set(re.findall(r"hsl\((\d+)", page))) == len({place * 137 % 360 for place in colours})


def test_the_picture_is_the_image() -> None:
    model, pixels = model_of("first", 5), torch.zeros(1, 3, 16, 24)
    pixels[:, 0] = 1.0
    image = token_maps(model, (pixels - 0.5) / 0.25, ["red"], mean=(0.5,) * 3, std=(0.25,) * 3).images[0]
    with Image.open(io.BytesIO(base64.b64decode(image.jpeg))) as picture:
        assert picture.size == (224, 149)
        assert all(abs(a - b) < 8 for a, b in zip(picture.getpixel((100, 50)), (255, 0, 0), strict=True))


def test_a_network_that_keeps_all_has_nothing_to_show() -> None:
    with pytest.raises(UserError, match=r"keeps all patches, so that there is nothing to show"):
        maps_of(model_of(None, None))


def test_sixteen_bits_of_grey_are_shown_as_they_are_learned_from(tmp_path: Path) -> None:
    """Pillow would make them white."""
    save_timm(model_of("evit", None, 6), tmp_path / "model")
    Image.new("I;16", (30, 30), 20000).save(tmp_path / "0.png")
    out = tmp_path / "page.html"
    assert main(["show-tokens", str(tmp_path / "model"), str(tmp_path / "0.png"), f"out={out}"]) == 0
    found = re.search(r"base64,([^\"]+)", out.read_text())
    assert found is not None
    with Image.open(io.BytesIO(base64.b64decode(found[1]))) as picture:
        assert all(abs(value - (20000 >> 8)) < 8 for value in picture.getpixel((100, 50)))


def test_show_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_timm(model_of("evit", None, 6), tmp_path / "model")
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        Image.new("RGB", (30, 30), (80 * number, 0, 0)).save(images / f"{number}.png")
    out = tmp_path / "made" / "page.html"
    assert main(["show-tokens", str(tmp_path / "model"), str(images), f"out={out}", "number=2"]) == 0
    page = out.read_text()
    assert page.count("<svg") == 2
    assert "6 of 24, by evit" in page
    assert "://" not in page
    assert main(["show-tokens", str(tmp_path / "model"), str(tmp_path / "nowhere")]) != 0
    assert "there is no such folder" in capsys.readouterr().err
    header = b"IHDR\0\0"
    short = b"\x89PNG\r\n\x1a\n\0\0\0\2" + header + zlib.crc32(header).to_bytes(4, "big")
    for damaged in (b"no image", short):
        (images / "0.png").write_bytes(damaged)
        assert main(["show-tokens", str(tmp_path / "model"), str(images), f"out={out}"]) != 0
        assert "0.png cannot be read as an image" in capsys.readouterr().err
