"""ModelContract: what every Model promises to timm and to us. Subclass it and give a fixture `model`."""

from __future__ import annotations

import copy
from itertools import pairwise
from math import prod
from typing import Any

import timm.data
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor

from vitnas.arch import Arch
from vitnas.data.augment import seeded_globals
from vitnas.layers.axes import named_axes
from vitnas.layers.selectors import SELECTIONS
from vitnas.model import Model, build
from vitnas.model.blocks import block_prefixes
from vitnas.testing.random import randomize_
from vitnas.testing.refusal import refusal

HEADS_WANTED = ("head", "head_dist?", "patch_head?")


def pools_by_size(model: Model) -> bool:
    """Whether its tokens alone do not tell their mean."""
    selector, pool = model.arch.selector, model.arch.global_pool
    return selector is not None and SELECTIONS[selector].has_sizes and pool != "token"


class ModelContract:
    """Tests of one Model; a fixture `model` gives a small one in evaluation mode, with a classifier."""

    def images(self, model: Model, n: int = 2) -> Tensor:
        shape = (n, *model.arch.input_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def test_forward_is_features_then_head(self, model: Model) -> None:
        images, arch = self.images(model), model.arch
        logits = model(images)
        assert logits.shape == (2, arch.num_classes)
        assert bool(logits.isfinite().all())
        features = model.forward_features(images)
        assert features.shape == (2, arch.num_final_tokens, arch.embed_dim)
        if pools_by_size(model):
            assert "stand for different numbers of patches" in refusal(lambda: model.forward_head(features))
            pooled = model(images, want=("pooled",))["pooled"]
        else:
            torch.testing.assert_close(model.forward_head(features), logits, rtol=0, atol=0)
            pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.num_features) == (2, model.head_hidden_size)
        if not arch.distill_token:  # else there are two, as in timm
            torch.testing.assert_close(model.get_classifier()(pooled), logits, rtol=0, atol=0)

    def test_every_head_answers_in_training(self, model: Model) -> None:
        images, arch = self.images(model), model.arch
        heads = model(images, want=HEADS_WANTED)
        shapes: dict[str, tuple[int, ...]] = {"head": (2, arch.num_classes)}
        shapes |= {"head_dist": (2, arch.num_classes)} if arch.distill_token else {}
        if arch.patch_head:
            shapes["patch_head"] = (2, arch.num_final_tokens - arch.num_prefix_tokens, arch.num_classes)
        assert {name: tuple(tensor.shape) for name, tensor in heads.items()} == shapes
        pooled = [heads[name] for name in ("head", "head_dist") if name in heads]
        torch.testing.assert_close(torch.stack(pooled).mean(0), model(images))

    def test_outputs_have_names(self, model: Model) -> None:
        images = self.images(model)
        found, features = model(images, want=model.output_names), model.forward_features(images)
        assert list(found) == model.output_names
        torch.testing.assert_close(found["logits"], model(images), rtol=0, atol=0)
        torch.testing.assert_close(found["tokens"], features, rtol=0, atol=0)
        if not pools_by_size(model):
            pooled = model.forward_head(features, pre_logits=True)
            torch.testing.assert_close(found["pooled"], pooled, rtol=0, atol=0)
        last = model.norm(found[f"blocks.{model.arch.depth - 1}"])
        torch.testing.assert_close(last, features, rtol=0, atol=0)
        maps = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
        for index, (tokens, prefix) in enumerate(zip(maps, block_prefixes(model.arch), strict=True)):
            torch.testing.assert_close(found[f"blocks.{index}"][:, prefix:], tokens, rtol=0, atol=0)
        assert "the output 'tokns' is wanted" in refusal(lambda: model(images, want=["tokns"]))
        assert list(model(images, want=["tokns?", "logits"])) == ["logits"]

    def test_images_do_not_mix(self, model: Model) -> None:
        images = self.images(model, 3)
        torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-5)

    def test_every_parameter_gets_a_gradient(self, model: Model) -> None:
        randomize_(model, torch.Generator().manual_seed(0))
        selector = model.arch.selector
        learned = ("scores",) if selector and SELECTIONS[selector].learns_scores else ()
        with seeded_globals(0):  # what a selector keeps is chance
            heads = model.train()(self.images(model), want=(*HEADS_WANTED, *learned))
        sum(tensor[tensor.isfinite()].square().sum() for tensor in heads.values()).backward()
        without = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
        assert not without, f"no gradient for {without}"
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)

    def test_reset_classifier(self, model: Model) -> None:
        images, arch = self.images(model), model.arch
        model.reset_classifier(arch.num_classes + 2)
        assert model(images).shape == (2, arch.num_classes + 2) == (2, model.num_classes)
        assert model.pretrained_cfg["num_classes"] == model.arch.num_classes == arch.num_classes + 2
        model.reset_classifier(0)
        assert model(images).shape == (2, model.num_features)
        model.reset_classifier(0, "")
        assert model(images).shape == (2, arch.num_final_tokens, model.num_features)
        if not arch.distill_token and arch.num_final_tokens > arch.num_prefix_tokens:
            if arch.ends_with_class and arch.drops_prefix:
                assert "has 1 class tokens and would have 0" in refusal(
                    lambda: model.reset_classifier(3, "avg")
                )
                return
            model.reset_classifier(3, "avg")
            assert model(images).shape == (2, 3)
            assert model.arch.global_pool == model.global_pool == "avg"
        assert "it must be one of token, avg, seq, map" in refusal(lambda: model.reset_classifier(3, "max"))  # type: ignore[arg-type]

    def test_maps_for_dense_tasks(self, model: Model) -> None:
        images, arch = self.images(model), model.arch
        if arch.selector is not None:
            self.assert_tokens_have_places(model)
            return
        final, maps = model.forward_intermediates(images, norm=True)
        assert [tuple(item.shape) for item in maps] == [
            (2, info["num_chs"], *(side // info["reduction"] for side in arch.input_size[1:]))
            for info in model.feature_info
        ]
        torch.testing.assert_close(final, model.forward_features(images), rtol=0, atol=0)
        tokens = final[:, model.num_prefix_tokens :]
        torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), tokens, rtol=0, atol=0)
        for info in model.feature_info:
            model.get_submodule(info["module"])

    def assert_tokens_have_places(self, model: Model) -> None:
        """Where patches are gone or merged there are no maps, but tokens and their places."""
        images, arch, prefix = self.images(model), model.arch, model.num_prefix_tokens
        assert "Use output_fmt='NLC'" in refusal(lambda: model.forward_intermediates(images))
        found = model.forward_intermediates(images, output_fmt="NLC", norm=True, output_dict=True)
        torch.testing.assert_close(found["image_features"], model.forward_features(images), rtol=0, atol=0)
        named = model(images, want=model.output_names)
        left, tokens = prod(arch.grids[0]), found["image_intermediates"]
        for index, places in enumerate(found["image_intermediates_places"]):
            left = prod(arch.grids[-1]) if index in model._entries else left
            left = left if (keep := arch.blocks[index].keep) is None else keep
            assert places.shape == tokens[index].shape[:2] == (2, left)
            assert bool((places.sort(dim=1).values.diff(dim=1) > 0).all())
            if left < prod(arch.grids[-1]):
                torch.testing.assert_close(named[f"places.{index}"], places)
        whole = named["keep"].sum(2)
        keeps = [block.keep for block in arch.blocks if block.keep is not None]
        torch.testing.assert_close(whole, torch.tensor([keeps] * 2, dtype=whole.dtype))
        torch.testing.assert_close(
            named["keep"][:, -1].nonzero()[:, 1].view(2, left), places.sort(dim=1).values
        )
        self.assert_groups(named["groups"], named["keep"])
        torch.testing.assert_close(
            model.norm(named[f"blocks.{arch.depth - 1}"])[:, prefix:], tokens[-1], rtol=0, atol=0
        )

    def assert_groups(self, groups: Tensor, keep: Tensor) -> None:
        """Every patch is in a token that goes on or in none, and every token holds at least the patch at its place."""
        place = torch.arange(groups.shape[2]).expand_as(groups)
        assert bool((groups[keep == 1] == place[keep == 1]).all())
        at = groups.clamp(min=0)
        assert bool((keep.gather(2, at)[groups >= 0] == 1).all())
        for earlier, later in pairwise(
            groups.unbind(1)
        ):  # what is together stays together, what is gone is gone
            moved = later.gather(1, earlier.clamp(min=0)).where(earlier >= 0, -1)
            torch.testing.assert_close(later, moved, rtol=0, atol=0)

    def test_masked_equals_dropped(self, model: Model) -> None:
        """Carrying dropped tokens along behind a mask, as in training, gives what goes on without them."""
        if model.arch.selector is None:
            return
        if not SELECTIONS[model.arch.selector].has_mask:  # then they leave in training too
            assert not model.train().carries_dropped
            assert (
                model(self.images(model), want=("tokens",))["tokens"].shape[1] == model.arch.num_final_tokens
            )
            return
        randomize_(model, torch.Generator().manual_seed(0))
        images, names = self.images(model), ("logits", "pooled", "keep", "scores", "groups")
        with torch.no_grad():
            dropped = model(images, want=names)
            model.masks_tokens = True
            masked = model(images, want=[*names, "tokens"])
        assert masked["tokens"].shape[1] == prod(model.arch.grids[-1]) + model.num_prefix_tokens
        for name in ("keep", "groups"):
            torch.testing.assert_close(masked[name], dropped[name], rtol=0, atol=0)
        for name in names:
            torch.testing.assert_close(masked[name], dropped[name], rtol=1e-5, atol=1e-5)

    def test_pruning_keeps_the_features(self, model: Model) -> None:
        images, depth = self.images(model), model.arch.depth
        want = model.forward_intermediates(images, [0], output_fmt="NLC", intermediates_only=True)
        assert model.prune_intermediate_layers([0], prune_norm=True) == [0]
        assert len(model.blocks) == model.arch.depth == len(model.feature_info) == 1 < depth
        got = model.forward_intermediates(images, [0], output_fmt="NLC", intermediates_only=True)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert f"indices is {depth}" in refusal(lambda: model.prune_intermediate_layers(depth))

    def test_set_input_size(self, model: Model) -> None:
        arch, before = model.arch, model(self.images(model))
        original = copy.deepcopy(model)
        height, width = arch.input_size[1:]
        model.set_input_size(img_size=(2 * height, 3 * width))
        assert model.arch.image_size == (2 * height, 3 * width)
        assert model.pretrained_cfg["input_size"][1:] == (2 * height, 3 * width)
        assert model(self.images(model)).shape == before.shape
        assert {n: p.shape for n, p in model.named_parameters()} == {
            n: p.shape for n, p in build(model.arch, device="meta").named_parameters()
        }
        rebuilt = build(model.arch).eval()
        rebuilt.load_state_dict(model.state_dict())
        images = self.images(model)
        torch.testing.assert_close(rebuilt(images), model(images), rtol=0, atol=0)
        original.set_input_size(img_size=arch.image_size)  # nothing to do
        torch.testing.assert_close(original(self.images(original)), before, rtol=0, atol=0)
        assert "must be a multiple of" in refusal(
            lambda: model.set_input_size(img_size=(height, 2 * width - 1))
        )

    def test_parameter_groups(self, model: Model) -> None:
        names = {name for name, _ in model.named_parameters()}
        own = ("pos_embed", "cls_token", "dist_token", "reg_token", "relative_position_bias_table")
        assert {name for name in names if name.endswith(own)} == model.no_weight_decay() & names
        layers = group_parameters(model, model.group_matcher(), reverse=True)
        assert set(layers) == names
        assert layers["patch_embed." + next(n for n, _ in model.patch_embed.named_parameters())] == 0
        assert all(
            layers[name] == 1 + int(name.split(".")[1]) for name in names if name.startswith("blocks.")
        )
        groups = param_groups_layer_decay(
            model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
        )
        assert sum(len(group["params"]) for group in groups) == len(names)
        by_id = {id(p): group for group in groups for p in group["params"]}
        assert by_id[id(next(model.patch_embed.parameters()))]["lr_scale"] == 0.5 ** (model.arch.depth + 1)
        assert by_id[id(model.head.weight)]["lr_scale"] == 1

    def test_checkpointing_changes_no_gradient(self, model: Model) -> None:
        randomize_(model, torch.Generator().manual_seed(0))
        images, found = self.images(model), []
        for enable in (False, True):
            model.zero_grad()
            model.set_grad_checkpointing(enable)
            model(images).square().sum().backward()
            maps = model.forward_intermediates(images, intermediates_only=True, output_fmt="NLC")
            found.append([*(p.grad for p in model.parameters() if p.grad is not None), *maps])
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)

    def test_timm_knows_the_input(self, model: Model) -> None:
        config = timm.data.resolve_model_data_config(model)
        assert config["input_size"] == model.arch.input_size
        assert len(config["mean"]) == len(config["std"]) == model.arch.in_chans
        cfg: dict[str, Any] = model.pretrained_cfg
        assert cfg is model.default_cfg
        heads = (cfg["classifier"],) if isinstance(cfg["classifier"], str) else cfg["classifier"]
        assert all(f"{head}.weight" in model.state_dict() for head in heads)
        assert f"{cfg['first_conv']}.weight" in model.state_dict()

    def test_arch_and_state_dict_say_everything(self, model: Model) -> None:
        randomize_(model, torch.Generator().manual_seed(0))
        again = build(Arch.from_json(model.arch.to_json())).eval()
        again.load_state_dict(model.state_dict())
        images = self.images(model)
        torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)

    def test_every_parameter_has_named_axes(self, model: Model) -> None:
        axes = named_axes(model)
        buffers = {name for name, _ in model.named_buffers()}
        assert set(axes) - buffers == {name for name, _ in model.named_parameters()}

    def test_double_precision(self, model: Model) -> None:
        images = self.images(model)
        single = model(images)
        torch.testing.assert_close(
            model.double()(images.double()).float(), single.detach(), rtol=1e-3, atol=1e-4
        )
