"""DynamicViT's code: predictor, masked softmax, pruned inference, training forward, gradients; published costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from vitnas.arch import Arch, Block, Stage
from vitnas.counting import count, parts
from vitnas.errors import UserError
from vitnas.layers.choose import PredictorSelection
from vitnas.layers.select import Kept, masked_softmax, sees
from vitnas.model import PUBLISHED, Model
from vitnas.model.dynamicvit_official import dynamicvit_tensors, load_dynamicvit
from vitnas.model.selections import keeps_of, selecting
from vitnas.train import Distillation, KeepRatio, Soft, Teacher
from vitnas.train.gives import Gives
from vitnas.train.task import Batch, read_views
from vitnas.train.teaching import TeacherConfig


@pytest.fixture(scope="module")
def golden(shared: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(shared / "golden" / "dynamicvit.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"])


def weights_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


@pytest.fixture(scope="module", params=["n196", "n64"])
def network(request: pytest.FixtureRequest, golden: Any) -> tuple[str, Model, list[int]]:
    tensors, config = golden
    net = config["networks"][request.param]
    block = Block(num_heads=net["heads"], head_dim=net["dim"] // net["heads"], mlp_hidden=4 * net["dim"])
    plain = Arch(
        image_size=net["img"],
        patch_size=net["patch"],
        num_classes=net["classes"],
        stages=(Stage(embed_dim=net["dim"], blocks=(block,) * net["depth"]),),
    )
    arch = selecting(plain, keeps_of(plain, 0.7, net["loc"]), "predictor")
    assert [block.keep for block in arch.blocks if block.keep] == net["kept"]
    assert count(arch).params == net["params"]
    return request.param, load_dynamicvit(weights_of(tensors, f"{request.param}/weights"), arch), net["loc"]


@pytest.mark.parametrize("size", ["", "_small"])
def test_predictor(golden: Any, size: str) -> None:
    tensors, _ = golden
    predictor = PredictorSelection(16, 3, grid=(1, 7), num_prefix_tokens=0)
    place = "score_predictor.0."
    theirs = {place + name: weight for name, weight in weights_of(tensors, "predictor/weights").items()}
    ours = dynamicvit_tensors(theirs, PUBLISHED["dynamicvit_deit_256_07"])
    predictor.load_state_dict({name.removeprefix("selections.3."): weight for name, weight in ours.items()})
    kept = Kept(mask_BN=tensors["predictor/policy"][..., 0])
    odds = predictor.score(tensors[f"predictor/x{size}"], kept, None)
    both = torch.stack([odds, -odds], dim=-1).sigmoid().log()
    torch.testing.assert_close(both, tensors[f"predictor/log_probs{size}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["softmax_with_policy", "softmax_with_policy_sharp"])
def test_masked_softmax(golden: Any, name: str) -> None:
    tensors, _ = golden
    mask = sees(tensors[f"{name}/policy"][..., 0])
    torch.testing.assert_close(
        masked_softmax(tensors[f"{name}/scores"], mask), tensors[f"{name}/out"], rtol=1e-5, atol=1e-7
    )


def test_pruned_inference(golden: Any, network: tuple[str, Model, list[int]]) -> None:
    tensors, (name, model, places) = golden[0], network
    found = model.eval()(tensors[f"{name}/images"], want=("logits", "keep", "scores"))
    torch.testing.assert_close(found["logits"], tensors[f"{name}/eval.logits"], rtol=1e-4, atol=1e-5)
    for index in range(len(places)):
        theirs = tensors[f"{name}/eval.keep_original.{index}"].long()
        want = torch.zeros_like(found["keep"][:, index]).scatter(1, theirs, 1.0)
        torch.testing.assert_close(found["keep"][:, index], want, rtol=0, atol=0)
        best = found["scores"][:, index].gather(1, theirs)  # theirs are in the order of their scores
        assert bool((best.diff(dim=1) <= 0).all())


def test_training_with_their_noise(
    golden: Any, network: tuple[str, Model, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decisions, logits and features equal theirs; so the decisions' gradients meet the same masked attention."""
    tensors, (name, model, places) = golden[0], network
    noise = [tensors[f"{name}/train.gumbel.{index}"] for index in range(len(places))]
    left = iter([-side for pair in noise for side in (pair[..., 1], pair[..., 0])])
    # A Gumbel variable is minus the logarithm of an exponential one.
    monkeypatch.setattr(Tensor, "exponential_", lambda self: self.copy_(next(left).exp()))
    found = model.train()(tensors[f"{name}/images"], want=("logits", "keep", "tokens"))
    for index in range(len(places)):
        want = tensors[f"{name}/train.decision.{index}"]
        torch.testing.assert_close(found["keep"][:, index].detach(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["logits"], tensors[f"{name}/train.logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found["tokens"][:, 1:], tensors[f"{name}/train.features"], rtol=1e-3, atol=1e-4
    )


def task_between(student: Model, teacher: Model, **ratio: Any) -> Distillation:
    """The four terms, by the authors' weights."""
    net = TeacherConfig(network="the same", losses=("soft", "tokens"), weights=(0.5, 0.5))
    task = net.task(KeepRatio(**ratio))
    assert isinstance(task, Distillation)
    return task.meet(*(Gives(network, lambda: student.arch.input_size) for network in (student, teacher)))


def test_every_loss_term_and_the_gradients(
    golden: Any, network: tuple[str, Model, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All variants of the authors' loss, and the gradients of the published one through the recorded draws."""
    tensors, (name, model, places), config = golden[0], network, golden[1]["networks"][network[0]]
    teacher = load_dynamicvit(weights_of(tensors, f"{name}/teacher.weights"), selecting(model.arch, {}, ""))
    images = tensors[f"{name}/images"]
    task = task_between(model, teacher, shares=tuple(config["ratio"]))
    noise = [tensors[f"{name}/train.gumbel.{index}"] for index in range(len(places))]
    left = iter([-side for pair in noise for side in (pair[..., 1], pair[..., 0])])
    monkeypatch.setattr(Tensor, "exponential_", lambda self: self.copy_(next(left).exp()))
    outputs = read_views(model.train(), (images,), task.wants)
    taught = Teacher(teacher).answer((images,), task.wants_taught)
    torch.testing.assert_close(taught["logits"], tensors[f"{name}/teacher.logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        taught["tokens"][:, 1:], tensors[f"{name}/teacher.tokens"], rtol=1e-4, atol=1e-4
    )

    soft, whole = (Batch((images,), tensors[f"{name}/labels.{kind}"]) for kind in ("soft", "int"))
    nothing = {**outputs, "keep": torch.zeros_like(outputs["keep"])}
    shares = {"shares": tuple(config["ratio"])}
    cases: dict[str, tuple[dict[str, Any], Batch, Any]] = {
        "soft_mse_w2": (shares, soft, outputs),
        "soft_mse_w5": ({**shares, "ratio_weight": 5.0}, soft, outputs),
        "int_mse_w2_dynamic": ({**shares, "per": "batch"}, whole, outputs),
        "nothing_kept_int_mse_w2": (shares, whole, nothing),
    }
    for case, (ratio, batch, given) in cases.items():
        want, found = config["losses"][case], task_between(model, teacher, **ratio)(given, batch, taught)
        theirs = {"ce": "cls", "soft": "cls_kl", "tokens": "token", "loss": "total"}
        assert found["loss"].shape == ()
        for ours, their in theirs.items():
            assert found[ours].item() == pytest.approx(want[their], rel=2e-5), (case, ours)
        assert 3 * found["ratio"].item() == pytest.approx(want["ratio_sum_over_stages"], rel=1e-5), case
    # Their other token loss is the divergence that `soft` takes of logits.
    kept = outputs["keep"][:, -1] > 0.5
    rows = {"logits": outputs["tokens"][:, 1:][kept]}, soft, {"logits": taught["tokens"][:, 1:][kept]}
    assert Soft()(*rows)["loss"].item() == pytest.approx(config["losses"]["soft_kl_w2"]["token"], rel=2e-5)

    loss = task(outputs, soft, taught)["loss"]
    torch.testing.assert_close(loss, tensors[f"{name}/loss.total"][0], rtol=2e-5, atol=0)
    loss.backward()
    grads = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in model.named_parameters()}
    ours = dynamicvit_tensors({key: torch.tensor(0) for key in config["grad_norm_names"]}, model.arch)
    norms = torch.stack([grads[key].norm() for key in ours])
    torch.testing.assert_close(norms, tensors[f"{name}/grad.norms"], rtol=5e-4, atol=1e-6)
    theirs = {key: t for key, t in weights_of(tensors, f"{name}/grad").items() if key != "norms"}
    for key, grad in dynamicvit_tensors(theirs, model.arch).items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-3, atol=1e-5, msg=key)


def test_published_costs(golden: Any) -> None:
    published = golden[1]["published_224"]
    names = {"deit-256": "256", "deit-s": "small", "deit-b": "base"}
    for key, figures in published.items():
        name, ratio = key.split("/")
        if name in names:
            arch = PUBLISHED[f"dynamicvit_deit_{names[name]}_{ratio.replace('.', '')}"]
            assert (count(arch).macs, count(arch).params) == (figures["macs"], figures["params"]), key
            predictors = [part.params for part in parts(arch) if part.name.startswith("selections.")]
            assert sum(predictors) == figures["predictor_params"]


def test_a_checkpoint_of_another_network_says_what_differs(golden: Any) -> None:
    theirs = weights_of(golden[0], "n64/weights")
    with pytest.raises(
        UserError, match=r"the checkpoint is not of d384.*is missing.*Give the Arch of its name"
    ):
        load_dynamicvit(theirs, PUBLISHED["dynamicvit_deit_small_07"])
