"""The authors' AutoFormer checkpoints, on a made-up one in their names and order."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from vitnas.errors import UserError
from vitnas.model import build
from vitnas.model.official import NAMES, TOP, arch_of_autoformer, autoformer_tensors, read_checkpoint
from vitnas.space import AutoFormerSpace, autoformer
from vitnas.supernet import AUTOFORMER_OFFICIAL, Supernet
from vitnas.supernet.official import autoformer_weights, load_autoformer_model, load_autoformer_supernet
from vitnas.testing import randomize_

SPACE: AutoFormerSpace = autoformer(
    "tiny",
    image_size=32,
    num_classes=5,
    embed_dims=(64, 96),
    depths=(1, 2),
    num_heads=(1, 2),
    mlp_ratios=(1.0, 2.0),
    relative_position=2,
)
# Theirs is wider and deeper than the space's largest, as their tiny is.
WIDE = replace(SPACE, embed_dims=(128,), depths=(3,), num_heads=(3,), mlp_ratios=(2.0,)).largest()


def their_name(name: str) -> str:
    for names in (NAMES, TOP):
        for theirs, ours in names.items():
            name = name.replace(f"{ours}.", f"{theirs}.") if f"{ours}." in f"{name}" else name
            name = name[: -len(ours)] + theirs if name.endswith(f".{ours}") else name
    return name


@pytest.fixture
def state(generator: torch.Generator) -> dict[str, Tensor]:
    """A state dict in their names, with rows of the qkv weight in the order q, k, v, q, k, v, ..."""
    model = build(WIDE)
    randomize_(model, generator)
    return {
        their_name(name): torch.stack(tensor.chunk(3), dim=1).flatten(0, 1)
        if name.endswith("qkv.weight")
        else tensor
        for name, tensor in model.state_dict().items()
    }


def test_their_names(state: dict[str, Tensor]) -> None:
    for name in (
        "patch_embed_super.proj.weight",
        "blocks.2.attn_layer_norm.bias",
        "blocks.0.ffn_layer_norm.weight",
        "blocks.0.fc1.weight",
        "blocks.1.attn.qkv.bias",
        "blocks.1.attn.rel_pos_embed_k.embeddings_table_v",
        "blocks.1.attn.rel_pos_embed_v.embeddings_table_h",
        "norm.weight",
        "head.bias",
        "cls_token",
        "pos_embed",
    ):
        assert name in state


def test_names_and_order_become_ours(state: dict[str, Tensor]) -> None:
    tensors = autoformer_tensors(state)
    assert {name: t.shape for name, t in tensors.items()} == {
        n: p.shape for n, p in build(WIDE).named_parameters()
    }
    qkv = state["blocks.0.attn.qkv.weight"]
    torch.testing.assert_close(
        tensors["blocks.0.attn.qkv.weight"], torch.cat([qkv[0::3], qkv[1::3], qkv[2::3]]), rtol=0, atol=0
    )
    bias = "blocks.0.attn.qkv.bias"
    torch.testing.assert_close(tensors[bias], state[bias], rtol=0, atol=0)
    rows = "attn.rel_pos_embed_k.embeddings_table_v"
    torch.testing.assert_close(
        tensors["blocks.1.attn.rel_pos_k.rows"], state[f"blocks.1.{rows}"], rtol=0, atol=0
    )
    assert arch_of_autoformer(tensors) == WIDE


def test_an_arch_is_cut_as_the_authors_cut(state: dict[str, Tensor]) -> None:
    arch = SPACE.smallest()  # width 64, 1 head, hidden 64, 1 block
    got = autoformer_weights(state, arch)
    assert {name: t.shape for name, t in got.items()} == {
        n: p.shape for n, p in build(arch).named_parameters()
    }
    # Their rule: the first 3 x 64 x heads, then every third.
    rows = state["blocks.0.attn.qkv.weight"][:192, :64]
    want = {
        "blocks.0.attn.qkv.weight": torch.cat([rows[0::3], rows[1::3], rows[2::3]]),
        "blocks.0.attn.qkv.bias": state["blocks.0.attn.qkv.bias"][:192],
        "blocks.0.attn.proj.weight": state["blocks.0.attn.proj.weight"][:64, :64],
        "blocks.0.mlp.fc2.weight": state["blocks.0.fc2.weight"][:64, :64],
        "blocks.0.attn.rel_pos_v.rows": state["blocks.0.attn.rel_pos_embed_v.embeddings_table_v"],
        "blocks.0.attn.rel_pos_v.cols": state["blocks.0.attn.rel_pos_embed_v.embeddings_table_h"],
        "pos_embed": state["pos_embed"][:, :, :64],
        "patch_embed.proj.weight": state["patch_embed_super.proj.weight"][:64],
        "head.weight": state["head.weight"][:, :64],
    }
    torch.testing.assert_close({name: got[name] for name in want}, want, rtol=0, atol=0)


def test_supernet_and_model_agree(state: dict[str, Tensor], generator: torch.Generator) -> None:
    supernet = Supernet(SPACE, sharing=AUTOFORMER_OFFICIAL).eval()
    load_autoformer_supernet(supernet, state)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    for arch in SPACE.corners():
        model = load_autoformer_model(state, arch)
        assert not model.training
        torch.testing.assert_close(model(images), supernet(images, arch), rtol=0, atol=0)


def test_files(state: dict[str, Tensor], tmp_path: Path) -> None:
    arch = SPACE.smallest()
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    torch.save({"model": state, "epoch": 499, "args": argparse.Namespace(gp=True)}, tmp_path / "b.pth")
    torch.save(state, tmp_path / "c.pth")
    for name in ("a.safetensors", "b.pth", "c.pth"):
        torch.testing.assert_close(
            autoformer_weights(tmp_path / name, arch), autoformer_weights(state, arch), rtol=0, atol=0
        )


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "DDP": lambda state: {"model": prefixed(state, "module.")},
    "compiled, in DDP": lambda state: prefixed(state, "module._orig_mod."),
    "a class around it": lambda state: {"state_dict": prefixed(state, "model.")},
    "numbers of numpy": lambda state: {
        "model": state,
        "best": np.float64(0.7),
        "epoch": np.int64(3),
        "curve": np.zeros(3, np.float32),
    },
    "an average beside it": lambda state: {
        "model": {name: torch.zeros_like(tensor) for name, tensor in state.items()},
        "model_ema": prefixed(state, "module."),
    },
    "an average of torch": lambda state: {
        "ema": {"n_averaged": torch.tensor(9), **prefixed(state, "module.")}
    },
    "in two": lambda state: {"model": {"state_dict": state, "step": 4}},
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_what_training_code_wraps_weights_in(state: dict[str, Tensor], tmp_path: Path, name: str) -> None:
    content = WRAPPINGS[name]({name: tensor.contiguous() for name, tensor in state.items()})
    torch.save(content, tmp_path / "a.pth")
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for source in (tmp_path / "a.pth", tmp_path / "old.pth", content):
        torch.testing.assert_close(read_checkpoint(source), dict(state), rtol=0, atol=0)
    arch = SPACE.smallest()
    want = autoformer_weights(state, arch)
    torch.testing.assert_close(autoformer_weights(tmp_path / "a.pth", arch), want, rtol=0, atol=0)


def test_numpy_1_wrote_its_numbers_under_another_name(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(
        {"model": dict(state), "best": np.float64(0.7)},
        tmp_path / "a.pth",
        _use_new_zipfile_serialization=False,
    )
    old = (tmp_path / "a.pth").read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in old
    (tmp_path / "a.pth").write_bytes(old)
    assert read_checkpoint(tmp_path / "a.pth").keys() == state.keys()


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code from a checkpoint was run')",))


def test_bad_files_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    torch.save({"model": {}}, tmp_path / "nothing.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(state, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:5000])
    (tmp_path / "folder.pth").mkdir()
    bad = ("evil.pth", "cut.pth", "folder.pth", "missing.pth", "missing.safetensors")
    garbage = {
        "text.pth": b"no checkpoint",
        "text.safetensors": b"no checkpoint",
        "empty.bin": b"",
        "pickle.pth": b"\x80garbage",
        "frame.pth": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        "stop.pth": b".",
        "zip.pth": b"PK\x03\x04" + bytes(100),
    }
    for name, content in garbage.items():
        (tmp_path / name).write_bytes(content)
    for name in (*bad, *garbage):
        with pytest.raises(
            UserError,
            match=rf"{name} cannot be read as a checkpoint \(.+\); it must be safetensors or a torch file",
        ):
            read_checkpoint(tmp_path / name)
    with pytest.raises(UserError, match=r"evil.* \(it holds .*exec besides tensors and plain values\)"):
        read_checkpoint(tmp_path / "evil.pth")
    for name in ("empty", "nothing", "list"):
        with pytest.raises(
            UserError, match=rf"{name}\.pth (holds no state dict|cannot be read as a checkpoint)"
        ):
            read_checkpoint(tmp_path / f"{name}.pth")


def test_other_checkpoints_are_refused(state: dict[str, Tensor]) -> None:
    arch = SPACE.smallest()
    with pytest.raises(UserError, match=r"has 1 names that an AutoFormer lacks \(layer1\.0\.conv\)"):
        autoformer_weights({**state, "layer1.0.conv": torch.zeros(1)}, arch)
    with pytest.raises(UserError, match=r"what was given holds no state dict"):
        autoformer_weights({}, arch)
    with pytest.raises(UserError, match=r"is not a whole AutoFormer \('head\.weight'"):
        autoformer_weights({name: t for name, t in state.items() if name != "head.weight"}, arch)
    with pytest.raises(UserError, match=r"the checkpoint lacks blocks\.1\.norm1\.bias"):
        autoformer_weights({n: t for n, t in state.items() if n != "blocks.1.attn_layer_norm.bias"}, arch)


def test_an_arch_that_does_not_fit_is_refused_with_all_reasons(state: dict[str, Tensor]) -> None:
    arch = SPACE.largest()
    block = replace(arch.blocks[0], num_heads=4, mlp_hidden=999)
    big = replace(arch, num_classes=7, stages=(replace(arch.stages[0], embed_dim=200, blocks=(block,) * 4),))
    with pytest.raises(
        UserError,
        match=r"num_classes is 7, the checkpoint's 5; embed_dim is 200, the checkpoint has 128; depth is 4, the "
        r"checkpoint has 3; block 0: num_heads is 4, the checkpoint has 3; block 0: mlp_hidden is 999, .* has 256",
    ):
        autoformer_weights(state, big)
    narrow = replace(arch, stages=(replace(arch.stages[0], blocks=(replace(arch.blocks[0], head_dim=32),)),))
    with pytest.raises(UserError, match=r"block 0: head_dim is 32, the checkpoint's 64"):
        autoformer_weights(state, narrow)
    with pytest.raises(UserError, match=r"has its norm before pooling"):
        autoformer_weights(state, replace(arch, fc_norm=True))
    blocks = (arch.blocks[0], replace(arch.blocks[1], keep=2))
    fewer = replace(arch, stages=(replace(arch.stages[0], blocks=blocks),), selector="predictor")
    with pytest.raises(UserError, match=r"an AutoFormer keeps all patches"):
        autoformer_weights(state, fewer)


def test_a_supernet_that_shares_in_another_way_is_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(UserError, match=r"sharing is not the authors'; .*sharing=AUTOFORMER_OFFICIAL"):
        load_autoformer_supernet(Supernet(SPACE), state)
