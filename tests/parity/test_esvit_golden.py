"""EsViT's training by the authors' code: losses and centres over five steps, heads, networks with crops of two sizes,
schedules, clipping."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitnas.model.sizes import take_other_sizes
from vitnas.model.timm_keys import from_timm
from vitnas.sample import Moment
from vitnas.train import Engine, EsViTConfig, SelfTeacher, TrainConfig, cosine
from vitnas.train.losses.esvit import Mixing, region_loss, view_loss
from vitnas.train.optim import make_schedule
from vitnas.train.projection_heads import ProjectionHead
from vitnas.train.task import read_views


@pytest.fixture(scope="module")
def golden(shared: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(shared / "golden" / "esvit.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("knn/")}
        return tensors, json.loads(file.metadata()["config"])["parts"]


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def close(found: Tensor, want: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(found, want.reshape(found.shape), **{"rtol": 1e-5, "atol": 1e-7, **tolerance})


def config(size: dict[str, Any]) -> EsViTConfig:
    return EsViTConfig(
        out_dim=size["out_dim"],
        local_crops_number=size["local"],
        student_temp=size["student_temp"],
        teacher_temp=size["teacher_temp"],
        warmup_teacher_temp=size["warmup_teacher_temp"],
        warmup_teacher_temp_epochs=size["warmup_teacher_temp_epochs"],
        center_momentum=size["center_momentum"],
    )


class Recorded(nn.Module):
    """A network, or a head, that gives what was recorded, or what it gets."""

    output_names = ("pooled", "tokens")

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.found: dict[str, Tensor] = {}

    def forward(self, x: Tensor, want: Any = None) -> Any:
        return x.clone() if want is None else self.found


def taught(config: EsViTConfig) -> SelfTeacher:
    """Its network says what was recorded, and its heads pass that on."""
    task = config.task()
    task.own = nn.ModuleDict({"view": Recorded(), "region": Recorded()})
    teacher = config.teacher(Recorded())
    teacher.join(task)
    return teacher


def answer(teacher: SelfTeacher, views: Tensor, regions: Tensor | None, batch: int) -> dict[str, Tensor]:
    network: Any = teacher.network
    network.found = {"pooled": views}
    want = ["views.0.view", "views.1.view"]
    if regions is not None:
        network.found["tokens"] = regions.unflatten(0, (len(views), -1))
        want += ["views.0.region", "views.1.region"]
    images = torch.zeros(batch, 3, 8, 8)
    return teacher.answer([images, images], want)


def regions_of(rows: Tensor, size: dict[str, Any]) -> list[Tensor]:
    """(B, P, .) of each crop; of the teacher there are two."""
    batch, whole, part = size["batch"], size["regions"], size["regions_local"]
    counts = [whole] * 2 + [part] * (size["local"] if len(rows) > 2 * batch * whole else 0)
    return [each.unflatten(0, (batch, -1)) for each in rows.split([batch * count for count in counts], dim=0)]


@pytest.mark.parametrize("kind", ["dino", "ddino"])
def test_losses_gradients_and_centres(golden: Any, kind: str) -> None:
    """Five steps in order, by one teacher: each is taught by the centres that the step before left."""
    tensors, parts = golden
    size = parts["losses"]
    teacher, temperature, batch = taught(config(size)), size["student_temp"], size["batch"]
    for step, epoch in enumerate(size["epochs"]):
        given, want = below(tensors, f"ddino/step{step}/"), below(tensors, f"{kind}/step{step}/")
        optimizer: Any = None
        teacher.before(Moment(step, 5, epoch, 0, nn.Identity(), optimizer, lambda tensor: None))
        view = given["student_view"].clone().requires_grad_()
        region = given["student_region"].clone().requires_grad_()
        close(teacher.centre("view"), want["center_before"])
        has_regions = kind == "ddino"
        told = answer(teacher, given["teacher_view"], given["teacher_region"] if has_regions else None, batch)
        loss = view_loss(view.split(batch), [told["views.0.view"], told["views.1.view"]], temperature)
        if has_regions:
            close(teacher.centre("region"), want["center_grid_before"])
            regions = region_loss(
                regions_of(region, size),
                regions_of(given["student_feature"], size),
                [told["views.0.region"], told["views.1.region"]],
                regions_of(given["teacher_feature"], size),
                temperature,
            )
            loss = (loss + regions) / 2
        loss.backward()
        teacher.after(step + 1, 5, teacher.network)
        close(loss.detach(), want["loss"])
        assert view.grad is not None
        close(view.grad, want["grad.student_view"])
        close(teacher.centre("view"), want["center_after"])
        if has_regions:
            assert region.grad is not None
            close(region.grad, want["grad.student_region"])
            close(teacher.centre("region"), want["center_grid_after"])


def test_mixed_images(golden: Any) -> None:
    tensors, parts = golden
    size, mixed = parts["losses"], below(tensors, "dino_mixup/")
    own_CB = mixed["targets"].diagonal(dim1=1, dim2=2)
    partner_B = torch.arange(size["batch"]).flip(0)
    told = answer(taught(config(size)), mixed["teacher_view"], None, size["batch"])
    found = view_loss(
        mixed["student_view"].split(size["batch"]),
        [told["views.0.view"], told["views.1.view"]],
        size["student_temp"],
        [Mixing(partner_B, own_B) for own_B in own_CB],
    )
    close(found, mixed["loss"])


@pytest.mark.parametrize("name", ["default", "free_gain", "bn", "one_layer"])
def test_heads(golden: Any, name: str) -> None:
    tensors, parts = golden
    size = dict(parts[f"head_{name}"])
    trainable, _ = size.pop("trainable"), size.pop("decayed")
    head = ProjectionHead(size.pop("in_dim"), size.pop("out_dim"), **size).eval()
    weights = below(tensors, f"head/{name}/weights.")
    head.load_state_dict({**head.state_dict(), **weights})
    assert {*weights} <= {*head.state_dict()}
    close(head(tensors[f"head/{name}/x"]), tensors[f"head/{name}/y"], atol=1e-6)
    assert [each for each, parameter in head.named_parameters() if parameter.requires_grad] == trainable


def make(name: str, tensors: dict[str, Tensor], size: dict[str, Any]) -> nn.Module:
    weights = below(tensors, f"{name}/weights.")
    weights = {key: value for key, value in weights.items() if not key.startswith("head")}
    given = {"img_size": size["img_size"], "patch_size": size["patch"], "embed_dim": size["embed_dim"]}
    if name == "vit":
        vit = VisionTransformer(**given, depth=size["depth"], num_heads=size["heads"], num_classes=0)
        vit.load_state_dict(weights)
        return from_timm(vit)
    norm = partial(nn.LayerNorm, eps=1e-6)
    depths, heads, window = size["depths"], size["heads"], size["window"]
    swin: nn.Module = SwinTransformer(
        **given, depths=depths, num_heads=heads, window_size=window, num_classes=0, norm_layer=norm
    )
    swin.load_state_dict(checkpoint_filter_fn(weights, swin))
    return swin


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_networks_with_crops_of_two_sizes(golden: Any, name: str) -> None:
    """Small crops fill up windows (Swin) and take positions of a smaller grid (ViT)."""
    tensors, parts = golden
    size = parts[name]
    network = make(name, tensors, size).eval()
    take_other_sizes(network, (3, size["img_size"], size["img_size"]), size["local"])
    views = [*tensors[f"{name}/crops.global"], *tensors[f"{name}/crops.local"]]
    crops, prefix = range(len(views)), int(name == "vit")
    with torch.no_grad():
        found = read_views(
            network, views, [f"views.{crop}.{kind}" for crop in crops for kind in ("pooled", "tokens")]
        )
    pooled = torch.cat([found[f"views.{crop}.pooled"] for crop in crops])
    regions = torch.cat([found[f"views.{crop}.tokens"][:, prefix:].flatten(0, 1) for crop in crops])
    near = {"rtol": 1e-5, "atol": 2e-5}
    close(regions, tensors[f"{name}/region_features"], **near)
    close(found["views.0.pooled"], tensors[f"{name}/view_feature.crop0"], **near)
    for part, features, want in [("head", pooled, "view_logits"), ("head_dense", regions, "region_logits")]:
        head = ProjectionHead(size["width"], **size["head"])
        head.load_state_dict(below(tensors, f"{name}/weights.{part}."))
        close(head(features), tensors[f"{name}/{want}"], **near)


def test_schedules(golden: Any) -> None:
    tensors, parts = golden
    teacher_temp = [config(parts["losses"]).teacher_temp_at(epoch) for epoch in range(300)]
    close(torch.tensor(teacher_temp, dtype=torch.float64), tensors["temperature_schedule"])
    steps = range(24)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters())
    train = TrainConfig(
        lr=1e-3, min_lr=1e-6, warmup_lr=0, warmup_epochs=2, epochs=6, schedule="dino", monitor_every=0
    )
    schedule, found = make_schedule(optimizer, train, len(steps), 4), []
    for step in steps:
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    close(torch.tensor(found, dtype=torch.float64), tensors["schedule/lr"], atol=1e-12)
    for name, start, end in [("weight_decay", 0.04, 0.4), ("momentum", 0.996, 1.0)]:
        values = [cosine(start, end)(step, len(steps)) for step in steps]
        close(torch.tensor(values, dtype=torch.float64), tensors[f"schedule/{name}"], atol=1e-12)


def test_clipping_by_tensor(golden: Any) -> None:
    tensors, _ = golden
    parameters = []
    for index in range(4):
        gradient = tensors[f"clip/before.{index}"]
        parameters.append(nn.Parameter(torch.zeros_like(gradient)))
        parameters[-1].grad = gradient.clone()
    norm = Engine(cpu=True).clip(parameters, 3.0, per_tensor=True)
    for index, parameter in enumerate(parameters):
        assert parameter.grad is not None
        close(parameter.grad, tensors[f"clip/after.{index}"])
    close(norm, tensors["clip/norms"].norm())
