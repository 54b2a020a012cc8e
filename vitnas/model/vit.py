"""Model: the static vision transformer of one Arch. It knows nothing of search.

It speaks timm: same parameter names as `timm.models.VisionTransformer` wherever timm can express the Arch, same
methods, same feature extraction for dense tasks. Every module names the axes of its parameters (`layers/axes.py`).

An Arch of several stages has one flat `blocks` and a reduction in front of each stage but the first.

Shapes: B images, N tokens (class token first), D embed_dim, CHW image, Y classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, Literal

import torch
from timm.layers import global_pool_nlc, resample_abs_pos_embed
from timm.models import checkpoint
from torch import Tensor, nn

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.grids import as_image_size, side_of, sides_of
from vitnas.layers.axes import Axes
from vitnas.layers.pool import AttentionPool, SequencePool
from vitnas.layers.resample import seen_positions
from vitnas.layers.select import OF_CHOICES, Kept, Trail, carried, masked_mean
from vitnas.layers.selectors import SELECTIONS
from vitnas.layers.stem import STEMS, at_size
from vitnas.model.blocks import (
    TransformerBlock,
    check_mixer_sizes,
    drop_path_rates,
    make_block,
    make_reduction,
    make_selections,
    pruned,
    reheaded,
    resized,
    set_block_grids,
    set_grids_between,
)
from vitnas.model.features import as_features, feature_info, stage_starts, take_indices
from vitnas.model.outputs import wanted
from vitnas.model.sizes import Twins
from vitnas.model.timm_cfg import default_cfg, described_anew, layer_groups

HEADS = ("head", "head_dist", "patch_head")


class Model(nn.Module):
    """The network of one Arch, with timm's interface.

    Use `build(arch)`, which also initialises the weights. `arch` is what was built; `drop_path` gives the rate of
    stochastic depth per block (or its end value, rising linearly from 0). `blocks` are ready-made ones for `arch`,
    which a Supernet keeps, as making them is most of the work.
    """

    def __init__(
        self,
        arch: Arch,
        *,
        drop_path: float | Sequence[float] = 0.0,
        blocks: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self._take_arch(arch)
        self.global_pool: str = arch.global_pool  # or "", which an Arch does not say: see reset_classifier
        self.grad_checkpointing = False
        self.masks_tokens: bool | None = None  # see carries_dropped
        self.dynamic_img_size = False  # take smaller images too, by `twins`
        self.twins = Twins()
        dim, first = arch.embed_dim, arch.stages[0].embed_dim
        self.patch_embed = STEMS[arch.stem](
            sides_of(arch.seen_size),
            arch.patch_size,
            arch.in_chans,
            first,
            arch.stem_width,
            **({"bias": False} if arch.pre_norm else {}),
        )
        self.patch_norm = nn.LayerNorm(first, eps=arch.norm_eps) if arch.patch_norm else nn.Identity()
        self.cls_token = nn.Parameter(torch.empty(1, 1, first)) if arch.class_token else None
        self.dist_token = nn.Parameter(torch.empty(1, 1, first)) if arch.distill_token else None
        self.reg_token = nn.Parameter(torch.empty(1, arch.reg_tokens, first)) if arch.reg_tokens else None
        places = prod(arch.grids[0]) + arch.num_prefix_positions
        self.pos_embed = nn.Parameter(torch.empty(1, places, first)) if arch.has_positions else None
        self.norm_pre = nn.LayerNorm(first, eps=arch.norm_eps) if arch.pre_norm else nn.Identity()
        if blocks is None:
            rates = iter(drop_path_rates(drop_path, arch.depth))
            blocks = [
                make_block(arch, index, block, next(rates))
                for index, stage in enumerate(arch.stages)
                for block in stage.blocks
            ]
        self.blocks = nn.Sequential(*blocks)
        self.reductions = nn.ModuleList(make_reduction(arch, index) for index in range(len(arch.stages) - 1))
        self.selections = make_selections(arch)
        eps = arch.norm_eps if arch.head_norm_eps is None else arch.head_norm_eps
        self.norm = nn.Identity() if arch.fc_norm else nn.LayerNorm(dim, eps=eps)
        self.fc_norm = nn.LayerNorm(dim, eps=eps) if arch.fc_norm else nn.Identity()
        self.attn_pool: AttentionPool | None = None
        self._make_heads()
        self.pretrained_cfg = self.default_cfg = default_cfg(arch)

    def _make_heads(self) -> None:
        """Classifiers as the Arch says, without initial values."""
        arch, dim, classes = self.arch, self.arch.embed_dim, self.arch.num_classes
        if self.global_pool != "map":
            self.attn_pool = None
        elif self.attn_pool is None:  # a trained one stays with another classifier, as in timm
            heads, hidden = arch.pool_num_heads, arch.pool_mlp_hidden
            self.attn_pool = AttentionPool(dim, heads, hidden, arch.act, norm_eps=arch.norm_eps)
        self.head: nn.Module = nn.Linear(dim, classes) if classes else nn.Identity()
        self.head_dist = nn.Linear(dim, classes) if classes and arch.distill_token else None
        self.patch_head = nn.Linear(dim, classes) if classes and arch.patch_head else None
        self.seq_pool = SequencePool(dim) if self.global_pool == "seq" else None

    def axes(self) -> dict[str, Axes]:
        dim: Axes = (("dim", self.embed_dim),)
        first: Axes = (("dim", self.arch.stages[0].embed_dim),)
        one: Axes = (("one", 1),)
        axes: dict[str, Axes] = {}
        for name in ("cls_token", "dist_token"):
            if getattr(self, name) is not None:
                axes[name] = one + one + first
        if self.reg_token is not None:
            axes["reg_token"] = (*one, ("reg_tokens", self.arch.reg_tokens), *first)
        if self.pos_embed is not None:
            axes["pos_embed"] = (*one, ("tokens", self.pos_embed.shape[1]), *first)
        norms = (("norm_pre", self.arch.pre_norm), ("patch_norm", self.arch.patch_norm))
        axes |= {f"{name}.{leaf}": first for name, is_on in norms if is_on for leaf in ("weight", "bias")}
        norm = "fc_norm" if self.arch.fc_norm else "norm"
        axes |= {f"{norm}.weight": dim, f"{norm}.bias": dim}
        for name in HEADS:
            if isinstance(head := getattr(self, name), nn.Linear):
                classes: Axes = (("classes", head.out_features),)
                axes |= {f"{name}.weight": classes + dim, f"{name}.bias": classes}
        return axes

    @property
    def output_names(self) -> list[str]:
        """What `want` can name (`model/outputs.py`)."""
        names = [name for name in HEADS if getattr(self, name) is not None]
        names += ["logits", "pooled", "tokens", *(f"blocks.{i}" for i in range(len(self.blocks)))]
        if self._selecting:
            fewer = range(min(self._selecting), len(self.blocks))
            names += [*OF_CHOICES, *(f"places.{i}" for i in fewer)]
        return names

    def forward(self, images_BCHW: Tensor, *, want: Sequence[str] | None = None) -> Any:
        """(B, C, H, W) images to (B, Y) logits; with `want` to the outputs of these names (`model/outputs.py`).

        Raises:
            UserError: a name that is not in `output_names`.
        """
        if self.dynamic_img_size and (twin := self.twins.of(self, images_BCHW)) is not None:
            return twin(images_BCHW, want=want)
        trail = Trail()
        if want is None:
            return self._head(self.norm(self._run(images_BCHW, trail)), trail.kept)
        found: dict[str, Any] = dict.fromkeys(wanted(want, self.output_names))
        if any(name in found for name in OF_CHOICES):
            trail.choices = []
        tokens_BND = self.norm(self._run(images_BCHW, trail, found))
        return {
            name: self._output(name, tokens_BND, trail) if output is None else output
            for name, output in found.items()
        }

    def _output(self, name: str, tokens_BND: Tensor, trail: Trail) -> Tensor:
        """What is made of the last tokens, or of the selections' choices, under that name."""
        kept = trail.kept
        if name == "tokens":
            return tokens_BND
        if name in OF_CHOICES:
            return trail.told_by_choices(name, tokens_BND, prod(self.arch.grids[-1]), self.num_prefix_tokens)
        if name in ("pooled", "logits"):
            return self._head(tokens_BND, kept, pre_logits=name == "pooled")
        if name == "patch_head":
            given = tokens_BND[:, self.num_prefix_tokens :].contiguous()
        else:
            given = self._pool(tokens_BND, kept) if name == "head" else tokens_BND[:, 1]
        logits: Tensor = getattr(self, name)(given)
        return logits

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, N, D) tokens of the last stage, after the final norm."""
        normed: Tensor = self.norm(self._run(images_BCHW, Trail()))
        return normed

    def _run(
        self, images_BCHW: Tensor, trail: Trail, found: dict[str, Any] | None = None, last: int | None = None
    ) -> Tensor:
        """The same before that norm, or behind block `last`; `found` takes what those blocks give whose names
        (`blocks.<i>`, `places.<i>`) are in it."""
        x_BND = self.embed(images_BCHW)
        # Calling `blocks` would keep the first block's input to the end.
        for index, block in enumerate(self.blocks):
            x_BND = self._enter(index, x_BND, trail)
            x_BND = self._through(index, block, x_BND, trail)
            if found is not None:
                if (name := f"blocks.{index}") in found:
                    found[name] = x_BND
                if (name := f"places.{index}") in found:
                    found[name] = trail.places(x_BND, self.num_prefix_tokens)
            if index == last:
                break
        return x_BND

    def _enter(self, index: int, x_BND: Tensor, trail: Trail) -> Tensor:
        """The input of block `index`: `x_BND` itself, or behind the reduction or the selection that stands there."""
        if index in self._entries:
            reduced: Tensor = self.reductions[self._entries[index]](x_BND)
            return reduced
        trail.entering = trail.kept
        if index not in self._selecting:
            return x_BND
        return trail.select(self.selections[str(index)], x_BND, masked=self.carries_dropped)

    def _through(self, index: int, block: nn.Module, x_BND: Tensor, trail: Trail) -> Tensor:
        """What `block`, of that number, makes of its input."""
        asked, (kept, picked) = self._asked[index], trail.enter()
        given = () if asked == "none" and kept is None and picked is None else (kept, asked, picked)
        out = checkpoint(block, x_BND, *given) if self.grad_checkpointing else block(x_BND, *given)
        if asked == "none":
            return out
        x_BND, trail.told = out
        return x_BND

    @property
    def carries_dropped(self) -> bool:
        """Whether tokens that selections drop are carried along and masked, instead of leaving: in training where one
        `masks_training`, unless `masks_tokens` says otherwise; never where tokens are merged (`has_mask`)."""
        return carried(self.selections.values(), training=self.training, asked=self.masks_tokens)

    def forward_head(self, x_BND: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N, D) tokens to (B, Y) logits, or to (B, D) pooled features with `pre_logits`.

        With `global_pool` "" nothing is pooled and the tokens' axis stays. A distillation token's features and logits
        are averaged with the class token's, as DeiT does.

        Raises:
            UserError: a mean over patches where some were dropped and carried along, or of tokens that stand for
                different numbers of patches, which the tokens do not tell.
        """
        sized = self.arch.selector is not None and SELECTIONS[self.arch.selector].has_sizes
        if self.global_pool in ("avg", "seq", "map") and (
            sized or (self._selecting and self.carries_dropped)
        ):
            hold = (
                "stand for different numbers of patches" if sized else "hold dropped patches, as in training"
            )
            raise UserError(
                f"the tokens of {self.arch.id} {hold}, and global_pool {self.global_pool!r} must go by that. Call the "
                f"model itself{'' if sized else ', or set masks_tokens=False'}."
            )
        return self._head(x_BND, None, pre_logits)

    def _head(self, x_BND: Tensor, kept: Kept | None, pre_logits: bool = False) -> Tensor:
        """The same, where selections left `kept`."""
        if self.dist_token is not None and self.global_pool == "token":
            if pre_logits or self.head_dist is None:
                return (x_BND[:, 0] + x_BND[:, 1]) / 2
            return (self.head(x_BND[:, 0]) + self.head_dist(x_BND[:, 1])) / 2
        pooled = self._pool(x_BND, kept)
        return pooled if pre_logits else self.head(pooled)

    def _pool(self, x_BND: Tensor, kept: Kept | None) -> Tensor:
        prefix, weights_BP = self.num_prefix_tokens, None
        pool: Any = self.seq_pool or self.attn_pool
        if kept is not None and kept.log_size_BN is not None and self.global_pool == "map":
            pool = partial(pool, log_size_Bn=kept.log_size_BN[:, prefix:])
        elif kept is not None and self.global_pool != "token":
            weights_BP = kept.weights_BP(prefix)
        if pool is None and weights_BP is not None and self.global_pool == "avg":
            pool = masked_mean
        pooled: Tensor = (
            global_pool_nlc(x_BND, pool_type=self.global_pool, num_prefix_tokens=prefix)
            if pool is None
            else pool(x_BND[:, prefix:], weights_BP)
        )
        normed: Tensor = self.fc_norm(pooled)
        return normed

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """Patches, tokens before them and positions, normed: (B, C, H, W) to (B, N, D)."""
        sizes, prefix = (self.arch.image_size, self.arch.seen_size), self.arch.num_prefix_positions
        x_BND = self.patch_embed(at_size(images_BCHW, *map(sides_of, sizes))).flatten(1, 2)
        x_BND = self.patch_norm(x_BND)
        places_1ND = seen_positions(self.pos_embed, self.arch.grids[0], self.seen, num_prefix_tokens=prefix)
        if self.no_embed_class:
            x_BND = x_BND + places_1ND
        known = (self.cls_token, self.dist_token, self.reg_token)
        tokens = [token.expand(x_BND.shape[0], -1, -1) for token in known if token is not None]
        if tokens:
            x_BND = torch.cat([*tokens, x_BND], dim=1)
        if places_1ND is not None and not self.no_embed_class:
            x_BND = x_BND + places_1ND
        normed: Tensor = self.norm_pre(x_BND)
        return normed

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Features after chosen blocks, as timm's method of this name: (B, D, H, W) maps or (B, N, D) tokens.

        Args:
            x: (B, C, H, W) images.
            indices: the last n blocks, or block numbers; None for all.
            return_prefix_tokens: give (features, class token) pairs, if there is a class token.
            norm: apply the final norm to each of the last stage (others have another width).
            stop_early: do not run blocks behind the last one asked for.
            output_fmt: "NCHW" maps or "NLC" tokens without the class token. Fewer patches than the grid has, behind a
                selection, are tokens.
            intermediates_only: leave out the final features.
            output_dict: give `image_features`, `image_intermediates` and `image_intermediates_prefix` by name, and
                where the Arch keeps fewer patches `image_intermediates_places`, their (B, P) numbers on the grid.

        Raises:
            UserError: blocks that do not exist, an unknown format, or a map where patches are gone.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt is {output_fmt!r}; it must be 'NCHW' or 'NLC'. Choose one.")
        take, last = take_indices(len(self.blocks), indices)
        take, final = sorted({*take}), stage_starts(self.arch)[-1]
        parts = ("blocks", "places") if self._selecting else ("blocks",)
        found: dict[str, Any] = dict.fromkeys(f"{part}.{index}" for part in parts for index in take)
        last_BND = self._run(x, Trail(), found, last if stop_early else None)
        tokens = [found[f"blocks.{index}"] for index in take]
        if norm:
            tokens = [self.norm(item) if i >= final else item for i, item in zip(take, tokens, strict=True)]
        return as_features(
            self.arch,
            take,
            tokens,
            [found[f"places.{index}"] for index in take] if self._selecting else [],
            None if intermediates_only else self.norm(last_BND),
            output_fmt=output_fmt,
            with_prefix=return_prefix_tokens,
            by_name=output_dict,
        )

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> Any:
        """`forward_intermediates` by the name and with the arguments that DINO's users know."""
        fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(x, n, return_prefix_tokens, norm, False, fmt, True)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last one asked for, and the head; returns the block numbers kept.

        `arch` follows, except that it cannot say that the final norm is gone. A stage that goes takes the final norm
        and the head with it, as they fit its width only.
        """
        take, last = take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        arch = pruned(self.arch, last)
        gone = len(arch.stages) < len(self.arch.stages)
        self.reductions = self.reductions[: len(arch.stages) - 1]
        for index in self._selecting:
            if index > last:
                del self.selections[str(index)]
        self._take_arch(arch)
        if prune_norm or gone:
            self.norm = nn.Identity()
        if prune_head or gone:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> Any:
        """The head, or with a distillation token both heads, as timm does."""
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def reset_classifier(
        self, num_classes: int, global_pool: Literal["token", "avg", "seq", "map", ""] | None = None
    ) -> None:
        """Give the model a fresh head for `num_classes` (0: none), and optionally another pooling.

        `global_pool` "" pools nothing, for dense tasks; the Arch then keeps the pooling it had.

        Raises:
            UserError: an unknown pooling, or "token" without a class token.
        """
        arch = reheaded(self.arch, num_classes, global_pool or self.arch.global_pool)
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.record_arch(arch)
        self._make_heads()
        score = None if self.seq_pool is None else self.seq_pool.score
        for head in (self.head, self.head_dist, self.patch_head, score):
            if isinstance(head, nn.Linear):
                head.to(self.head_like)
                nn.init.trunc_normal_(head.weight, std=0.02)
                nn.init.zeros_(head.bias)

    @property
    def head_like(self) -> Tensor:
        """A weight in the type and place that new ones take."""
        return next(self.patch_embed.parameters())

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Change the image or patch size, in pixels; positions of all stages and patches are resampled as timm does.

        Tables of relative positions stay: they go by distance in patches. Where blocks keep fewer patches, they keep
        the same share of them, rounded.

        Raises:
            UserError: an image that the patch and the reductions do not divide, or fewer tokens than a mixer's rank
                or landmarks. The Model is then as it was.
        """
        old = self.arch
        arch = resized(
            old,
            old.image_size if img_size is None else as_image_size("img_size", img_size),
            old.patch_size if patch_size is None else side_of("patch_size", patch_size),
        )
        check_mixer_sizes(arch)
        self.patch_embed.set_input_size(img_size=sides_of(arch.seen_size), patch_size=arch.patch_size)
        if self.pos_embed is not None and arch.grids[0] != old.grids[0]:
            table = resample_abs_pos_embed(
                self.pos_embed, [*arch.grids[0]], [*old.grids[0]], num_prefix_tokens=arch.num_prefix_positions
            )
            self.pos_embed = nn.Parameter(table.detach(), requires_grad=self.pos_embed.requires_grad)
        set_block_grids(self.blocks, arch)
        set_grids_between(self.reductions, self.selections, arch)
        noted = getattr(self, "_model_args", None)
        if noted is not None:  # timm's factory made this Model, and its savers read what it noted
            size = sides_of(arch.image_size)
            self._model_args: dict[str, Any] = {**noted, "img_size": size, "patch_size": arch.patch_size}
            self._traits: dict[str, Any] = {**getattr(self, "_traits", {}), "img_size": size}
        self.record_arch(arch)

    def record_arch(self, arch: Arch) -> None:
        """Take `arch` as what this Model now is, in timm's description of it too."""
        self._take_arch(arch)
        self.pretrained_cfg = self.default_cfg = described_anew(self.pretrained_cfg, arch)

    def _take_arch(self, arch: Arch) -> None:
        """Take `arch` and what follows from it."""
        self.arch, self.seen = arch, arch.grids[0]
        self.in_chans, self.num_classes = arch.in_chans, arch.num_classes
        self.num_prefix_tokens, self.no_embed_class = arch.num_prefix_tokens, arch.no_embed_class
        self.embed_dim = self.num_features = self.head_hidden_size = arch.embed_dim
        self.feature_info = feature_info(arch)
        self._entries = {start: index for index, start in enumerate(stage_starts(arch)[1:])}
        self._selecting = {index for index, block in enumerate(arch.blocks) if block.keep is not None}
        self._asked = arch.asked

    def set_drop_path(self, rate: float | Sequence[float]) -> None:
        """Change stochastic depth: its rate at the last block, rising linearly from 0, or one rate per block."""
        for block, each in zip(self.blocks, drop_path_rates(rate, len(self.blocks)), strict=True):
            assert isinstance(block, TransformerBlock)
            block.set_drop_path(each)

    def no_weight_decay(self) -> set[str]:
        """Parameters besides biases and norms that are not decayed, as in timm's VisionTransformer."""
        tables = {n for n, _ in self.named_parameters() if n.endswith("relative_position_bias_table")}
        own = ("pos_embed", "cls_token")
        later = tables | {
            f"reductions.{index}.{name}" for index in range(len(self.reductions)) for name in own
        }
        return {"pos_embed", "cls_token", "dist_token", "reg_token"} | later

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates, as in timm; what stands in front of a block goes with it."""
        return layer_groups(self._entries, self._selecting)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable
