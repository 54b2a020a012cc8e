"""Manifold distillation by the authors' code: each term, the whole criterion, a DeiT that learns from a CaiT."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

from vitnas.model.timm_keys import from_timm
from vitnas.train import Batch, Classification, Distillation, Hard, Manifold, Soft, Task, Teacher
from vitnas.train.gives import Gives
from vitnas.train.losses import manifold
from vitnas.train.losses.manifold import of_chosen, over_images, unit, within_images
from vitnas.train.task import read_views
from vitnas.train.teacher import settled_task

LAYERS = ["a", "b", "scaled", "single_image"]
TOTALS = ["published_weights", "hard", "distilled_student"]


@pytest.fixture(scope="module")
def golden(shared: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(shared / "golden" / "manifold.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, json.loads(file.metadata()["config"])["parts"]


def close(found: Tensor, want: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(found, want.reshape(found.shape), **{"rtol": 1e-5, "atol": 1e-7, **tolerance})


@pytest.mark.parametrize("layer", LAYERS)
def test_each_term_and_its_gradient(golden: Any, layer: str) -> None:
    tensors, parts = golden
    found = {name.rpartition("/")[2]: t for name, t in tensors.items() if name.startswith(f"layer/{layer}/")}
    chosen = found["perm"][: parts[f"layer_{layer}"]["K"]]
    for name, term in [
        ("intra", within_images),
        ("inter", over_images),
        ("random", lambda s, t: of_chosen(s, t, chosen)),
    ]:
        student = found["student"].clone().requires_grad_()
        loss = term(unit(student), unit(found["teacher"]))
        loss.backward()
        close(loss.detach(), found[name])
        close(student.grad, found[f"grad.{name}"])  # type: ignore[arg-type]


def criterion(config: dict[str, Any]) -> Distillation:
    """The whole loss with the weights of a golden case."""
    alpha = config["alpha"]
    learned = Manifold(
        blocks=tuple(zip(config["s_id"], config["t_id"], strict=True)),
        sample=config["w_sample"],
        patch=config["w_patch"],
        random=config["w_rand"],
        num_random=config["K"],
    )
    logits: Task = Hard() if config.get("kind") == "hard" else Soft(temperature=config["tau"])
    return Distillation(
        losses={"logits": (logits, alpha), "manifold": (learned, config["beta"])},
        labels=Classification(),
        label_weight=1 - alpha,
    )


def replay(monkeypatch: pytest.MonkeyPatch, perms: Tensor) -> None:
    """Draw what the authors' code drew, one permutation after the other."""
    drawn = iter(perms)

    def draw(num: int) -> Tensor:
        chosen = next(drawn)
        assert len(chosen) == num
        return chosen

    monkeypatch.setattr(manifold, "drawn", draw)


def check(
    losses: dict[str, Tensor], config: dict[str, Any], terms: Tensor, total: Tensor, **tolerance: float
) -> None:
    beta = config["beta"]
    weighted = [(1 - config["alpha"]) * losses["labels"], config["alpha"] * losses["logits"]]
    weighted += [beta * losses[f"manifold_{name}"] for name in ("sample", "patch", "random")]
    close(torch.stack(weighted).detach(), terms, **tolerance)
    close(losses["loss"].detach(), total, **tolerance)


def described(prefix: int, side: int, depth: int, tokens: int, classes: int) -> Gives:
    """A network of which only the sizes are known."""
    network: Any = SimpleNamespace(num_prefix_tokens=prefix, num_classes=classes)
    gives = Gives(network, lambda: (3, side, side))
    shapes = {f"blocks.{index}": torch.Size((1, tokens, 1)) for index in range(depth)}
    vars(gives).update(image_size=(side, side), depth=depth, _shapes=shapes)
    return gives


@pytest.mark.parametrize("name", TOTALS)
def test_the_criterion_of_given_outputs(golden: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Tokens before the patches are the student's alone; those of a distilled one have their own logits."""
    tensors, parts = golden
    config, start = parts[f"total_{name}"], f"total/{name}/"
    found = {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
    side = int(config["teacher_tokens"] ** 0.5)

    def gives(whose: str) -> Gives:
        tokens = config[f"{whose}_tokens"]
        return described(tokens - side**2, side, 5, tokens, found["teacher_logits"].shape[-1])

    task = criterion(config).meet(gives("student"), gives("teacher"))
    outputs, taught = (
        {f"blocks.{key.partition('.')[2]}": t for key, t in found.items() if key.startswith(f"{whose}.")}
        for whose in ("student", "teacher")
    )
    outputs["logits"] = outputs["head"] = found["student_logits"]
    if "student_dist_logits" in found:
        outputs["head_dist"] = found["student_dist_logits"]
    replay(monkeypatch, found["perms"])
    losses = task(outputs, Batch((), found["labels.soft"]), {**taught, "logits": found["teacher_logits"]})
    check(losses, config, found["terms"], found["total"])


def test_class_tokens_among_the_patches(golden: Any) -> None:
    """Between networks with equally many tokens the authors' code keeps them; ours compares patches alone."""
    tensors, parts = golden
    config, start = parts["total_soft_half_tau3"], "total/soft_half_tau3/"
    found = []
    for number, (s, t) in enumerate(zip(config["s_id"], config["t_id"], strict=True)):
        pair = unit(tensors[f"{start}student.{s}"]), unit(tensors[f"{start}teacher.{t}"])
        chosen = tensors[f"{start}perms"][number][: config["K"]]
        found.append(torch.stack([over_images(*pair), within_images(*pair), of_chosen(*pair, chosen)]))
    close(torch.stack(found).mean(0) * config["beta"], tensors[f"{start}terms"][2:])
    logits = {"logits": tensors[f"{start}student_logits"]}, {"logits": tensors[f"{start}teacher_logits"]}
    soft = Soft(temperature=3.0)(logits[0], Batch((), torch.zeros(3, 0)), logits[1])
    close(config["alpha"] * soft["loss"], tensors[f"{start}terms"][1])


def weights_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("ours", [False, True])
def test_a_deit_learns_from_a_cait(golden: Any, monkeypatch: pytest.MonkeyPatch, ours: bool) -> None:
    """From images to the gradients of every weight: of timm's student and of the same as a Model."""
    tensors, parts = golden
    config = parts["net"]
    sizes = {"img_size": config["img"], "patch_size": 8, "depth": 4, "num_classes": 10}
    student = timm.create_model("deit_tiny_patch16_224", embed_dim=24, num_heads=3, **sizes)
    student.load_state_dict(weights_of(tensors, "net/student.weights."))
    network: nn.Module = from_timm(student.eval()) if ours else student.eval()
    teacher = timm.create_model("cait_xxs24_224", embed_dim=32, num_heads=4, **sizes).eval()
    teacher.load_state_dict(weights_of(tensors, "net/teacher.weights."))
    size = (3, config["img"], config["img"])
    for each in (student, teacher):
        each.pretrained_cfg["input_size"] = size
    taught_by = Teacher(teacher)
    task = settled_task(criterion(config), network, taught_by, None, lambda: size)
    images = tensors["net/images"]
    outputs = read_views(network, [images], task.wants)
    taught = taught_by.answer([images], task.wants_taught)
    close(outputs["blocks.3"].detach(), tensors["net/student_block.3"], rtol=1e-4, atol=1e-6)
    close(taught["blocks.3"], tensors["net/teacher_block.3"], rtol=1e-4, atol=1e-6)
    replay(monkeypatch, tensors["net/perms"])
    losses = task(outputs, Batch((images,), tensors["net/labels.soft"]), taught)
    check(losses, config, tensors["net/terms"], tensors["net/total"], rtol=1e-4)
    losses["loss"].backward()
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    names = config["grad_norm_names"]
    close(
        torch.stack([grads[name].norm() for name in names]), tensors["net/grad.norms"], rtol=1e-4, atol=1e-6
    )
    for name, grad in weights_of(tensors, "net/grad.").items():
        if name != "norms":
            close(grads[name], grad, rtol=1e-4, atol=1e-6)


def test_the_papers_pairs_are_the_default() -> None:
    student, teacher = described(1, 14, 12, 197, 0), described(0, 14, 24, 196, 0)
    task = Manifold().meet(student, teacher)
    blocks = [0, 1, 2, 3, 8, 9, 10, 11], [0, 1, 2, 3, 20, 21, 22, 23]
    for wants, numbers in zip((task.wants, task.wants_taught), blocks, strict=True):
        assert [name for name in wants if name != "keep?"] == [f"blocks.{index}" for index in numbers]
