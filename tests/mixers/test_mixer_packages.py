"""Beside the packages that people use: equal where these are right, and different where they are not.

They are in the extra `peers`. Where one is missing its tests say NOT CHECKED.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from timm.models.mlp_mixer import MixerBlock
from torch import Tensor

from vitnas.mixers import MIXERS
from vitnas.mixers.nystrom import pseudo_inverse
from vitnas.testing import randomize_
from vitnas.testing.flops import random_input

DIM, HEADS, HEAD_DIM = 24, 3, 8


def package(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they use what newer versions of Python and torch are about to drop
        try:
            return importlib.import_module(name)
        except ImportError:
            pytest.skip(f"NOT CHECKED against {name}: pip install 'vitnas[peers]'.")


def ours(word: str, **options: Any) -> Any:
    kind: Any = MIXERS[word]
    mixer = kind(DIM, HEADS, head_dim=HEAD_DIM, grid=(8, 8), **{"qkv_bias": False, **options})
    randomize_(mixer, torch.Generator().manual_seed(0))
    mixer.initialize_own(torch.Generator().manual_seed(0))
    return mixer.double().eval()


def tokens(n: int, images: int = 2) -> Tensor:
    return random_input((images, n, DIM), dtype=torch.float64)


def take(theirs: Any, mixer: Any) -> Any:
    """Put our weights into their module."""
    inner = HEADS * HEAD_DIM
    rows = dict(zip(("to_q", "to_k", "to_v"), mixer.qkv.weight.split(inner), strict=True))
    with torch.no_grad():
        for name, weight in rows.items():
            if hasattr(theirs, name):
                getattr(theirs, name).weight.copy_(weight)
                if getattr(theirs, name).bias is not None:
                    getattr(theirs, name).bias.zero_()
        out = theirs.to_out[0] if isinstance(theirs.to_out, torch.nn.Sequential) else theirs.to_out
        out.weight.copy_(mixer.proj.weight)
        out.bias.copy_(mixer.proj.bias)
        if hasattr(theirs, "to_qkv"):
            theirs.to_qkv.weight.copy_(mixer.qkv.weight)
            theirs.res_conv.weight.copy_(mixer.conv.weight)
        if hasattr(theirs, "fast_attention"):
            theirs.fast_attention.projection_matrix.copy_(mixer.features)
        if hasattr(theirs, "proj_v"):
            theirs.proj_k.copy_(mixer.proj_k)
            theirs.proj_v.copy_(mixer.proj_v)
    return theirs.eval()


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_performer_pytorch() -> None:
    mixer = ours("performer", size=11)
    kind = package("performer_pytorch").SelfAttention
    theirs = take(
        kind(DIM, heads=HEADS, dim_head=HEAD_DIM, causal=False, nb_features=11, qkv_bias=False).double(), mixer
    )  # fmt: skip
    for n in (64, 65):
        same(mixer(tokens(n)), theirs(tokens(n)))


def test_performer_of_vision_xformer_mixes_images(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = ours("performer", size=11)
    kind = package("vision_xformer.vision_performer").SelfAttention
    # Gone from torch; theirs cannot be made without.
    monkeypatch.setattr(torch, "qr", lambda a, some: torch.linalg.qr(a))
    theirs = take(
        kind(DIM, heads=HEADS, dim_head=HEAD_DIM, causal=False, nb_features=11, qkv_bias=False).double(), mixer
    )  # fmt: skip
    x = tokens(65)
    each = torch.cat([theirs(x[:1]), theirs(x[1:])])
    assert (theirs(x) - each).abs().max() > 1e-7
    same(mixer(x), torch.cat([mixer(x[:1]), mixer(x[1:])]))
    mixer.official = True
    same(mixer(x), theirs(x))


def test_linformer() -> None:
    for prefix in (0, 1):
        mixer = ours("linformer", size=5, num_prefix_tokens=prefix)
        theirs = package("linformer").LinformerSelfAttention(
            DIM, 64 + prefix, k=5, heads=HEADS, dim_head=HEAD_DIM
        )
        same(mixer(tokens(64 + prefix)), take(theirs.double(), mixer)(tokens(64 + prefix)))


@pytest.mark.parametrize("name", ["nystrom_attention", "vision_xformer.vision_nystromformer"])
def test_nystrom_attention(name: str) -> None:
    mixer = ours("nystrom", size=4)
    kind = package(name).NystromAttention
    theirs = take(kind(DIM, dim_head=HEAD_DIM, heads=HEADS, num_landmarks=4).double(), mixer)
    # Equal segments, and one image with one head's norms: equal up to where the iteration starts.
    x = tokens(64, images=1)
    with torch.no_grad():
        assert (mixer(x) - theirs(x)).norm() < 1e-3 * theirs(x).norm()
        # Tokens that do not divide: theirs puts zero tokens in front, which take part in softmax.
        odd = tokens(65, images=1)
        assert (mixer(odd) - theirs(odd)).norm() > 1e-3 * theirs(odd).norm()
        # The norms of the whole batch: theirs mixes images.
        pair = torch.cat([x, 5 * random_input((1, 64, DIM), 2, torch.float64)])
        assert (theirs(pair)[:1] - theirs(x)).abs().max() > 1e-6
        same(mixer(pair)[:1], mixer(x))
        mixer.official = True
        for both in (x, odd, pair):
            same(mixer(both), theirs(both))


def test_fourier_of_vision_xformer() -> None:
    mixer, x = MIXERS["fourier"](DIM, HEADS), tokens(65)  # type: ignore[call-arg]
    same(mixer(x), package("vision_xformer.fnet").FNetBlock()(x))


def test_fourier2d_of_vision_xformer() -> None:
    mixer, x = MIXERS["fourier2d"](DIM, HEADS, grid=(8, 8)), tokens(64)  # type: ignore[call-arg]
    block = package("vision_xformer.fnet2d").FourierBlock(dim=DIM)
    block.ff = torch.nn.Identity()  # the transform alone
    same(mixer(x), block(x.transpose(1, 2).unflatten(2, (8, 8))).flatten(2).transpose(1, 2))


def test_token_mlp_of_timm() -> None:
    kind: Any = MIXERS["token_mlp"]
    mixer = kind(DIM, HEADS, size=12, grid=(8, 8), num_prefix_tokens=0).double()
    randomize_(mixer, torch.Generator().manual_seed(0))
    block = MixerBlock(DIM, 64, mlp_ratio=(12 / DIM, 1.0)).double()
    block.norm1 = torch.nn.Identity()
    block.mlp_tokens.load_state_dict(mixer.state_dict())
    block.mlp_channels = torch.nn.Sequential()  # block(x) = x + mixed + norm2(x + mixed)
    x = tokens(64)
    same(x + mixer(x) + block.norm2(x + mixer(x)), block(x))


def test_the_pseudo_inverse_converges() -> None:
    """To the inverse that LAPACK finds, faster than by squares; singular values far below the largest take longer."""
    logits = random_input((3, 2, 16, 16), dtype=torch.float64)
    a = (2 * logits + 3 * torch.eye(16)).softmax(-1)
    want = torch.linalg.pinv(a)
    errors = [float((pseudo_inverse(a, n) - want).norm() / want.norm()) for n in (2, 4, 6, 8, 10, 14)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9
    for hard in (logits.softmax(-1), torch.full((1, 1, 16, 16), 1 / 16, dtype=torch.float64)):
        z = pseudo_inverse(hard)
        residual = (hard @ z @ hard - hard).norm() / hard.norm()
        assert residual < 0.1  # also of one that has no inverse
        assert bool(z.isfinite().all())


def test_norms_of_the_whole_batch_mix_images() -> None:
    logits = random_input((2, 1, 8, 8), dtype=torch.float64)
    a = torch.cat([logits[:1], 9 * logits[1:]]).softmax(-1)
    same(pseudo_inverse(a)[:1], pseudo_inverse(a[:1]))
    assert (pseudo_inverse(a, joint=True)[:1] - pseudo_inverse(a[:1], joint=True)).abs().max() > 1e-6
