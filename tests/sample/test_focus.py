"""The learned sampler: the policy is a distribution, it learns, it resumes, and it works on every Space."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from train_help import Kill, Killed

from vitnas.arch import Arch
from vitnas.data import Augment, EvalBatches, TrainBatches, synthetic
from vitnas.errors import UserError
from vitnas.sample import BestUp, Focus, FocusConfig, Hook, Moment
from vitnas.sample.focus import table_cost
from vitnas.sample.policy import Policy
from vitnas.sample.score_model import ScoreModel
from vitnas.searching.latency import LatencyModel
from vitnas.space import SPACES, AutoFormerSpace, Space, VitasSpace
from vitnas.supernet import Supernet
from vitnas.train import Classification, TrainConfig, fit, metrics

TINY = AutoFormerSpace(
    image_size=8, patch_size=4, num_classes=4, embed_dims=(8, 16), depths=(1, 2), num_heads=(1, 2),
    mlp_ratios=(1.0, 2.0), head_dim=8, relative_position=0,
)  # fmt: skip
MICRO = AutoFormerSpace(
    image_size=8, patch_size=4, num_classes=4, embed_dims=(16, 24, 32), depths=(1, 2, 3), num_heads=(1, 2),
    mlp_ratios=(1.0, 2.0, 3.0), head_dim=8, relative_position=2,
)  # fmt: skip


def anchors(space: Space) -> list[float]:
    costs = table_cost(space, "macs")(space.random_matrix(1000, np.random.default_rng(0)))
    return np.linspace(costs.min(), costs.max(), 4).tolist()


def untied(space: Space) -> Policy:
    policy = Policy(space, anchors(space), generator=torch.Generator().manual_seed(0))
    for parameter in policy.parameters():  # far from uniform, or else a wrong mask would hardly show
        nn.init.normal_(parameter, std=0.7, generator=torch.Generator().manual_seed(parameter.numel()))
    return policy


def test_probabilities_of_all_archs_sum_to_one() -> None:
    every = itertools.product(*(range(n) for n in TINY.num_options))
    genes = np.array(sorted({TINY.canonical(genes) for genes in every}))
    assert len(genes) == TINY.size()
    policy = untied(TINY)
    for budget in policy.anchors:
        drawn = policy(torch.full((len(genes),), budget), given_NG=genes)
        assert float(drawn.log_prob_N.detach().exp().sum()) == pytest.approx(1, abs=1e-5)


def test_what_is_drawn_has_the_probability_that_it_is_said_to_have() -> None:
    policy = untied(TINY)
    drawn = policy(torch.full((4000,), policy.anchors[1]), generator=torch.Generator().manual_seed(1))
    said = policy(torch.full((4000,), policy.anchors[1]), given_NG=drawn.genes_NG)
    torch.testing.assert_close(said.log_prob_N, drawn.log_prob_N)
    found, first, counts = np.unique(drawn.genes_NG, axis=0, return_index=True, return_counts=True)
    share = drawn.log_prob_N.detach().exp().numpy()[first]
    assert len(found) > 10
    np.testing.assert_allclose(counts / 4000, share, atol=0.03)


def test_a_gene_that_does_not_matter_has_no_entropy() -> None:
    policy = untied(TINY)
    drawn = policy(torch.full((200,), policy.anchors[0]), generator=torch.Generator().manual_seed(2))
    active = torch.from_numpy(TINY.active_matrix(drawn.genes_NG))
    assert not bool(active.all())
    assert bool(((drawn.entropy_NG > 0) == active).all())
    assert (TINY.canonical_matrix(drawn.genes_NG) == drawn.genes_NG).all()


def test_budgets_between_anchors_are_interpolated() -> None:
    policy = untied(TINY)
    first, second, *_, last = policy.anchors
    asked = torch.tensor(
        [first, second, 0.25 * first + 0.75 * second, last, 10 * last, 0.0], dtype=torch.float64
    )
    got = policy.embed(asked)
    table = policy.budget
    want = torch.stack(
        [table[0], table[1], 0.25 * table[0] + 0.75 * table[1], table[-1], table[-1], table[0]]
    )
    torch.testing.assert_close(got, want)


def test_quality_finds_an_additive_truth_although_every_group_is_shifted() -> None:
    rng, quality = np.random.default_rng(0), ScoreModel(MICRO, ridge=1e-3, decay=1.0)
    worth = rng.normal(size=sum(MICRO.num_options))
    for _ in range(60):
        genes = MICRO.random_matrix(4, rng)
        quality.add(genes, quality.features(genes) @ worth + 100 * rng.normal())
    fresh = MICRO.random_matrix(500, rng)
    truth = quality.features(fresh) @ worth
    assert np.corrcoef(truth, quality(fresh))[0, 1] > 0.999


def mean_heads(arch: Arch) -> float:
    return sum(block.num_heads for block in arch.blocks) / arch.depth


class Told(nn.Module):
    """Stands for a Supernet: an Arch's loss follows from its heads only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor, arch: Arch) -> Tensor:
        logits = torch.zeros(len(images), arch.num_classes)
        logits[:, 0] = 2 * mean_heads(arch)
        return logits


class Zeros:
    """Two held-out batches of class 0."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(2):
            yield torch.zeros(64, 3, 8, 8), torch.zeros(64, dtype=torch.int64)


def moment(step: int, steps: int, network: nn.Module) -> Moment:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    return Moment(step, steps, 0.0, 0, network, optimizer, lambda tensor: None)


def learned(
    kind: Any, steps: int, *, until: int | None = None, state: dict[str, Tensor] | None = None
) -> Any:
    focus = kind(MICRO, Zeros(), config=FocusConfig(every=1, warmup=0.1, images=8, updates=2, draws=32))
    start = 0
    if state is not None:
        focus.restore(state)
        start = int(state["step"])
    network = Told()
    for step in range(start, steps if until is None else until):
        focus.before(moment(step, steps, network))
    return focus


def test_it_learns_what_is_worth_its_cost() -> None:
    """At equal cost more heads are better here: the policy must come to prefer them, at about the budget."""
    focus = learned(Focus, 100)
    budget = 0.5 * (focus.low + focus.high)
    genes = focus.ask(torch.full((200,), budget), seed=3)
    costs = focus.cost_of(genes)
    assert abs(costs.mean() / budget - 1) < 0.1
    sides = genes, focus.uniform_near(costs, seed=4)
    heads = [np.mean([mean_heads(MICRO.arch_of(tuple(row))) for row in side.tolist()]) for side in sides]
    assert heads[0] > heads[1] + 0.25, heads
    shares = focus.preferences(64)["num_heads.0"]
    assert len(shares) == focus.config.anchors
    assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in shares)
    assert np.mean(shares, axis=0)[1] > 0.7


class TwoSides(Told):
    """The same with a second weight set that has learned nothing."""

    sides = 2

    def forward(self, images: Tensor, arch: Arch, side: int = 0) -> Tensor:
        return super().forward(images, arch) * (1 - side)


def test_an_arch_is_scored_by_all_its_weight_sets() -> None:
    scores = []
    for network in (Told(), TwoSides()):
        focus = Focus(MICRO, Zeros(), config=FocusConfig(every=1, warmup=0.1, images=8, updates=2, draws=32))
        told = focus.before(moment(1, 10, network))
        assert told is not None
        scores.append(told["score"])
    chance = -math.log(MICRO.num_classes)
    assert scores[1] == pytest.approx((scores[0] + chance) / 2, rel=1e-5)


@pytest.mark.parametrize("spacing", ["log", "even"])
def test_cheap_budgets_get_their_share(spacing: Any) -> None:
    """`log`: as many budgets below the geometric mean as above; `even`: below the arithmetic mean."""
    focus = Focus(MICRO, config=FocusConfig(spacing=spacing))
    middle = (focus.low * focus.high) ** 0.5 if spacing == "log" else (focus.low + focus.high) / 2
    budgets = focus._budgets(2000, torch.Generator().manual_seed(0)).numpy()
    assert np.mean(budgets < middle) == pytest.approx(0.5, abs=0.04)
    assert focus.low <= budgets.min() < budgets.max() <= focus.high
    anchors = focus.policy.anchors
    assert (anchors[0], anchors[-1]) == pytest.approx((focus.low, focus.high))
    steps = np.diff(np.log(anchors) if spacing == "log" else anchors)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)


def test_best_up_trains_the_best_guesses_only() -> None:
    best = learned(BestUp, 60)
    heads = [mean_heads(draw.arch) for i in range(60) if (draw := best.draw(random.Random(i))[0]).arch]
    uniform = [mean_heads(MICRO.sample(random.Random(i))) for i in range(60)]
    assert np.mean(heads) > np.mean(uniform) + 0.2
    assert set(best.tensors()) == {"quality.products", "quality.targets", "queue"}, "there is no policy"


@pytest.mark.parametrize("kind", [Focus, BestUp])
def test_a_sampler_that_is_resumed_equals_one_that_was_not(kind: type[Focus] | type[BestUp]) -> None:
    whole = learned(kind, 40)
    cut = learned(kind, 40, until=23)
    state = {name: value.clone() for name, value in cut.tensors().items()}
    resumed = learned(kind, 40, state={**state, "step": torch.tensor(23)})
    for name, value in whole.tensors().items():
        assert torch.equal(value, resumed.tensors()[name]), name


def test_it_is_uniform_while_warming_up_and_for_the_floor() -> None:
    focus = Focus(MICRO, Zeros(), config=FocusConfig(floor=0.5))
    assert isinstance(focus, Hook)
    assert focus.before(moment(0, 100, Told())) is None
    assert focus.draw(random.Random(0))[0].arch == MICRO.sample(random.Random(0))
    focus.queue = np.array([MICRO.encode(MICRO.largest())])
    share = np.mean([focus.draw(random.Random(i))[0].arch == MICRO.largest() for i in range(400)])
    assert 0.4 < share < 0.6


@pytest.mark.parametrize("kind", sorted(SPACES))
def test_it_works_on_every_space(kind: str) -> None:
    space = SPACES[kind].make(**({"network": "deit_tiny_patch16_224"} if kind == "around" else {}))
    focus = Focus(space, config=FocusConfig(draws=8))
    for greedy in (False, True):
        genes = focus.ask(torch.linspace(focus.low, focus.high, 4), greedy=greedy)
        assert (space.canonical_matrix(genes) == genes).all()
        assert all(space.arch_of(tuple(row)) in space for row in genes.tolist())


def test_training_with_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    data = synthetic(num_classes=4, image_size=8, n=96)

    def run(folder: Path, stop: int | None) -> Supernet:
        focus = Focus(
            MICRO,
            EvalBatches(data.holdout, batch_size=8),
            config=FocusConfig(every=2, images=8, updates=1, draws=16),
        )
        network = Supernet(MICRO, generator=torch.Generator().manual_seed(0))
        loader = TrainBatches(data.train, Augment(), batch_size=16, seed=0)
        config = TrainConfig(epochs=8 / loader.steps_per_epoch, checkpoint_minutes=0, warmup_epochs=0)
        hooks = [] if stop is None else [Kill(stop)]
        fit(network, Classification(), focus, loader, config=config, folder=folder, hooks=hooks)
        return network

    whole = run(tmp_path / "whole", None)
    with pytest.raises(Killed):
        run(tmp_path / "cut", 5)
    again = run(tmp_path / "cut", None)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    lines = [line for line in metrics.read_lines(tmp_path / "cut") if isinstance(line, metrics.Hooked)]
    assert [(line.event, line.step) for line in lines] == [("focus", 2), ("focus", 4), ("focus", 6)]
    assert len(lines[0].said["cost_ratio"]) == 8


def test_budgets_are_those_that_it_was_trained_for() -> None:
    """The vectors belong to budgets; another spacing now must not put them elsewhere."""
    was = learned(Focus, 20)
    now = Focus(MICRO, config=FocusConfig(spacing="even"))
    assert now.policy.anchors != was.policy.anchors
    now.restore({name: value.clone() for name, value in was.tensors().items()})
    assert now.policy.anchors == was.policy.anchors
    assert (now.low, now.high) == pytest.approx((was.low, was.high))
    budgets = torch.linspace(was.low, was.high, 16)
    assert (now.ask(budgets, greedy=True) == was.ask(budgets, greedy=True)).all()


class Broken(Told):
    """A Supernet whose logits have become no numbers."""

    def forward(self, images: Tensor, arch: Arch) -> Tensor:
        return super().forward(images, arch) * float("nan")


def test_scores_that_are_no_numbers_teach_nothing() -> None:
    focus = learned(Focus, 20)
    before = focus.score_model.products.clone()
    told = focus.before(moment(20, 40, Broken()))
    assert told is not None
    assert "score" not in told
    assert torch.equal(focus.score_model.products, before)
    assert all(bool(value.isfinite().all()) for value in focus.tensors().values())


def test_a_space_of_equal_costs_has_no_budgets_to_learn() -> None:
    flat = VitasSpace(
        image_size=8, patch_sizes=(4,), embed_dims=(8,), num_heads=(1, 2), inner_dims=(8,), mlp_hiddens=(16,),
        num_slots=2, identity=False,
    )  # fmt: skip
    with pytest.raises(UserError, match="cost the same"):
        Focus(flat)


def test_the_test_split_is_refused(tmp_path: Path) -> None:
    data = synthetic(n=64)
    with pytest.raises(UserError, match="would learn from the test split"):
        Focus(MICRO, EvalBatches(data.open_test(tmp_path / "reads.json"), batch_size=8))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"spacing": "linear"}, r"sampler\.spacing is 'linear'; it must be log or even"),
        ({"anchors": 1}, r"sampler\.anchors is 1; it must be at least 2"),
        ({"margin": 0.5}, r"sampler\.margin is 0\.5; it is a share"),
        ({"floor": 1.0}, r"sampler\.floor is 1\.0"),
        ({"lr": 0.0}, r"sampler\.lr is 0\.0; it must be above 0"),
    ],
    ids=str,
)
def test_bad_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        FocusConfig(**options)


def test_a_cost_without_a_table_is_named() -> None:
    with pytest.raises(UserError, match=r"sampler\.quantity is 'flops'; known are macs, params, memory"):
        FocusConfig(quantity="flops")
    with pytest.raises(UserError, match=r"is 'latency@torch'; the cost table has macs, params and memory"):
        Focus(MICRO, config=FocusConfig(quantity="latency@torch"))


class Clock:
    """A meter whose time is linear in the number of parameters."""

    def measure(self, model: nn.Module) -> float:
        return 0.5 + 1e-5 * sum(p.numel() for p in model.parameters())


def test_latency_of_archs_that_were_not_timed() -> None:
    model = LatencyModel.fit(MICRO, Clock(), n=24)
    assert model.error < 0.02
    genes = MICRO.random_matrix(20, np.random.default_rng(5))
    want = 0.5 + 1e-5 * MICRO.cost_table().costs(genes)["params"]
    np.testing.assert_allclose(model.cost_of(MICRO)(genes), want, rtol=0.03)
    focus = Focus(
        MICRO, cost_of=model.cost_of(MICRO), config=FocusConfig(quantity="latency@onnxruntime,batch=1")
    )
    assert focus.low > 0.5
