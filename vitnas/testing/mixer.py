"""MixerContract: what every token mixer promises. Subclass it, name the mixer's word and write its equations.

class TestMyMixer(MixerContract):
    word = "my_mixer"

    def equations(self, mixer, x_BND):
        return ...      # the paper's formula, in plain steps, in the precision of x_BND
"""

from __future__ import annotations

import copy
import inspect
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitnas.arch import Arch, Block, Stage
from vitnas.exporting import export_onnx
from vitnas.grids import Grid
from vitnas.layers.axes import named_axes, named_tensors
from vitnas.measure.memory import peak_activation_bytes
from vitnas.mixers import MIXERS, Mixer, MixerShape
from vitnas.model import Model, build
from vitnas.testing.flops import counted_macs, random_input
from vitnas.testing.random import randomize_
from vitnas.testing.refusal import refusal

DIM, HEADS, HEAD_DIM = 24, 3, 8
POSITIONS = ("none", "rotary", "rotary_2d")


class MixerContract:
    """Tests of one mixer, `word`; `size` is its own number and `prefixes` the class tokens that it can take."""

    word: ClassVar[str]
    size: ClassVar[int | None] = None
    prefixes: ClassVar[tuple[int, ...]] = (0, 1)
    # Odd and even numbers of tokens.
    grids: ClassVar[tuple[Grid, ...]] = ((3, 3), (8, 8), (3, 5), (9, 2))

    def equations(self, mixer: Any, x_BND: Tensor) -> Tensor:
        """What the paper says, step by step."""
        raise NotImplementedError

    @property
    def kind(self) -> type[Mixer]:
        return MIXERS[self.word]

    def options(self, grid: Grid, prefix: int, rotary: str = "none") -> dict[str, Any]:
        options: dict[str, Any] = {"grid": grid, "num_prefix_tokens": prefix, "size": self.size}
        return options | ({"head_dim": HEAD_DIM, "rotary": rotary} if self.kind.has_heads else {})

    def make(self, grid: Grid, prefix: int, rotary: str = "none", **other: Any) -> Mixer:
        kind: Any = self.kind
        mixer: Mixer = kind(DIM, HEADS, **self.options(grid, prefix, rotary), **other)
        generator = torch.Generator().manual_seed(0)
        randomize_(mixer, generator)
        with torch.no_grad():
            mixer.initialize_own(generator)
        return mixer.eval()

    def cases(self) -> list[tuple[Grid, int, str]]:
        """Grids, class tokens and positions: every pair of two of them, but not every three."""
        cases = [(grid, prefix, "none") for grid in self.grids for prefix in self.prefixes]
        if self.kind.has_heads:
            cases += [(self.grids[0], prefix, kind) for prefix in self.prefixes for kind in POSITIONS[1:]]
            cases += list(zip(self.grids[1:], self.prefixes[::-1], POSITIONS[:0:-1], strict=False))
        return cases

    def shape(self, grid: Grid, prefix: int, rotary: str, bias: bool = True) -> MixerShape:
        size = self.kind.resolve_size(self.size, HEAD_DIM, prod(grid) + prefix)
        heads = (HEADS, HEAD_DIM)
        return MixerShape(DIM, *heads, size, grid, prefix, rotary=rotary, qkv_bias=bias)  # type: ignore[arg-type]

    def test_the_equations_of_the_paper(self) -> None:
        for grid, prefix, rotary in self.cases():
            mixer = self.make(grid, prefix, rotary).double()
            x = random_input((2, prod(grid) + prefix, DIM), dtype=torch.float64)
            torch.testing.assert_close(mixer(x), self.equations(mixer, x), rtol=1e-9, atol=1e-10)

    def test_images_do_not_mix(self) -> None:
        for grid, prefix, rotary in self.cases():
            mixer = self.make(grid, prefix, rotary).double()
            x = random_input((3, prod(grid) + prefix, DIM), dtype=torch.float64)
            x[1] *= 30  # a loud neighbour
            torch.testing.assert_close(mixer(x)[2:], mixer(x[2:]), rtol=1e-10, atol=1e-11)

    def test_every_token_reaches_the_output(self) -> None:
        """The class token first of all; and nothing else, such as padding, does: see the equations."""
        for grid, prefix, rotary in self.cases():
            mixer = self.make(grid, prefix, rotary)
            x = random_input((1, prod(grid) + prefix, DIM)).requires_grad_()
            out = mixer(x)
            assert out.shape == x.shape
            (out[:, 0] * random_input((1, DIM), 2)).sum().backward()
            assert x.grad is not None
            assert bool(x.grad.abs().sum(-1).gt(0).all()), (grid, prefix, rotary)

    def test_gradients_reach_every_parameter(self) -> None:
        for prefix in self.prefixes:
            mixer = self.make((5, 5), prefix)
            x = random_input((2, 25 + prefix, DIM)).requires_grad_()
            (mixer(x) ** 3).sum().backward()
            for name, parameter in mixer.named_parameters():
                assert parameter.grad is not None, name
                assert bool(parameter.grad.isfinite().all()), name
                assert bool(parameter.grad.any()), name

    def test_half_precision_stays_finite(self) -> None:
        for dtype, loud in ((torch.float16, 3.0), (torch.bfloat16, 30.0)):
            for prefix in self.prefixes:
                mixer = self.make((8, 8), prefix)
                x = loud * random_input((1, 64 + prefix, DIM))
                half = copy.deepcopy(mixer).to(dtype)(x.to(dtype))
                assert half.dtype == dtype
                assert bool(half.isfinite().all())
                given = x.clone().requires_grad_()
                with torch.autocast("cpu", dtype=dtype):
                    mixed = mixer(given)
                assert bool(mixed.isfinite().all())
                mixed.float().mean().backward()
                grads = [given.grad, *(parameter.grad for parameter in mixer.parameters())]
                assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads)
                quiet = random_input((1, 64 + prefix, DIM))
                got = copy.deepcopy(mixer).to(dtype)(quiet.to(dtype)).float()
                want = mixer(quiet).detach()
                assert (got - want).norm() < 0.05 * want.norm()

    def test_another_resolution(self) -> None:
        for prefix in self.prefixes:
            mixer = self.make((3, 3), prefix)
            before = random_input((2, 9 + prefix, DIM))
            kept = mixer(before).detach()
            mixer.set_grid((3, 3))
            torch.testing.assert_close(mixer(before), kept, rtol=1e-5, atol=1e-5)
            after = random_input((2, 20 + prefix, DIM))
            if self.kind.fixed_tokens or self.kind.needs_grid:
                message = refusal(lambda mixer=mixer, after=after: mixer(after))  # type: ignore[misc]
                assert f"{self.word} was given {20 + prefix} tokens; it was made for {9 + prefix}" in message
                assert "Call set_input_size" in message
            mixer.set_grid((5, 4))
            assert mixer(after).shape == after.shape
            assert {n: p.shape for n, p in mixer.named_parameters()} == {
                n: p.shape for n, p in self.make((5, 4), prefix).named_parameters()
            }

    def test_macs_are_those_of_the_counter(self) -> None:
        for grid, prefix, rotary in self.cases():
            want = self.kind.macs(self.shape(grid, prefix, rotary))
            assert counted_macs(self.make(grid, prefix, rotary), (1, prod(grid) + prefix, DIM)) == want

    def test_params(self) -> None:
        for grid, prefix, rotary in self.cases():
            for bias in (False, True):
                other = {"qkv_bias": bias} if self.kind.has_heads else {}
                mixer = self.make(grid, prefix, rotary, **other)
                want = self.kind.params(self.shape(grid, prefix, rotary, bias))
                assert sum(parameter.numel() for parameter in mixer.parameters()) == want

    def test_memory_is_what_is_alive_at_the_peak(self) -> None:
        """Of the mixer by itself, on the CPU and without storage."""
        for grid, prefix, rotary in self.cases():
            want = self.kind.memory(self.shape(grid, prefix, rotary))
            mixer = self.make(grid, prefix, rotary)
            for device in ("meta", None):
                alone = peak_activation_bytes(_Alone(mixer, prefix), (DIM, *grid), device=device)
                assert alone == 4 * (want + (prod(grid) + prefix) * DIM), (grid, prefix, rotary, device)

    def test_memory_grows_with_the_tokens(self) -> None:
        """No more than in proportion, but for weights: a log-log slope of 1.1 from 1,024 to 16,384 tokens."""
        low, high = (
            self.kind.memory(self.shape((side, side), self.prefixes[0], "none")) for side in (32, 128)
        )
        assert high <= low * 16**1.1

    def test_axes_name_every_dimension(self) -> None:
        for grid, prefix, rotary in self.cases():
            mixer = self.make(grid, prefix, rotary)
            axes = named_axes(mixer)
            assert set(axes) == {*named_tensors(mixer)}

    def test_masks_are_refused(self) -> None:
        mixer = self.make((2, 2), self.prefixes[0])
        x = random_input((1, 4 + self.prefixes[0], DIM))
        assert "was given a mask" in refusal(lambda: mixer(x, is_causal=True))
        assert "was given a mask" in refusal(lambda: mixer(x, attn_mask=x))

    def test_sizes_that_cannot_work_are_refused(self) -> None:
        for size in (0, -1):
            assert f"mixer_size is {size}" in refusal(
                lambda size=size: self.kind.resolve_size(size, HEAD_DIM, 9)  # type: ignore[misc]
            )
        if self.kind.size_below_tokens:
            message = refusal(lambda: self.kind.resolve_size(10, HEAD_DIM, 9))
            assert "mixer_size is 10" in message
            assert "Nearest: 9" in message
        if self.kind.fixed_tokens or self.kind.needs_grid:
            assert "grid is (0, 0)" in refusal(lambda: self.make((0, 0), 0))

    def test_timm_can_call_it(self) -> None:
        """Its first arguments are those of timm's attention."""
        named = list(inspect.signature(self.kind.__init__).parameters)[1:3]
        assert named == ["dim", "num_heads"]

    def model(self, grid: Grid = (4, 4)) -> Model:
        """A Model of one block with this mixer, everything random."""
        prefix = self.prefixes[-1]
        word: Any = self.word
        sizes = {"num_heads": HEADS, "head_dim": HEAD_DIM, "mlp_hidden": 20}
        block = Block(**sizes, mixer=word, mixer_size=self.size)
        arch = Arch(
            image_size=(4 * grid[0], 4 * grid[1]),
            patch_size=4,
            num_classes=5,
            stages=(Stage(embed_dim=DIM, blocks=(block,)),),
            class_token=bool(prefix),
            global_pool="token" if prefix else "avg",
        )
        model = build(arch, generator=torch.Generator().manual_seed(3))
        own = {name: tensor.clone() for name, tensor in model.named_buffers()}
        randomize_(model, torch.Generator().manual_seed(0))
        for name, tensor in model.named_buffers():
            tensor.copy_(own[name])
        return model.eval()

    def check_export(self, folder: Any, exporter: Any) -> None:
        model = self.model()
        images = random_input((3, 3, 16, 16))
        record = export_onnx(model, folder / f"{self.word}.onnx", images, exporter=exporter)
        assert record["exporter"] == exporter
        assert record["max_abs_diff"] < 1e-4


class _Alone(torch.nn.Module):
    """A mixer as a model of images whose pixels are tokens, with zero class tokens."""

    def __init__(self, mixer: Mixer, prefix: int) -> None:
        super().__init__()
        self.mixer, self.prefix = mixer, prefix

    def forward(self, images_BDGG: Tensor) -> Tensor:
        x_BND = torch.nn.functional.pad(images_BDGG.flatten(2), (self.prefix, 0)).transpose(1, 2).contiguous()
        out_BND: Tensor = self.mixer(x_BND)
        return out_BND
