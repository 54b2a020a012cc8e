"""Focus: a Sampler that learns, while the Supernet trains, which Archs are worth training for each budget.

Source: FocusFormer (arXiv 2208.10861): uniform sampling spends most steps on Archs that nobody will pick, so a policy
conditioned on the budget is learned by policy gradient in turns with the Supernet, and is asked directly
afterwards. The paper's code is not public; every field of `FocusConfig` is our choice, with its reason here and a
row in PAPERS.md.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.arch import Arch
from vitnas.budget import QUANTITIES, split_target
from vitnas.errors import UserError, nearest
from vitnas.model.modes import evaluating
from vitnas.sample.held_out import HeldOut, Rounds
from vitnas.sample.hook import Moment
from vitnas.sample.policy import Drawn, Policy
from vitnas.sample.sampler import Draw, Given, SamplerConfig
from vitnas.sample.score_model import Floats, ScoreModel
from vitnas.space import Matrix, Space, kind_of

WATCH_EVERY = 4  # looks between two records of what the policy would draw

CostOf = Callable[[Matrix], Floats]
"""(N, genes) canonical genes to (N,) costs of the quantity that budgets are in."""


@dataclass(frozen=True, kw_only=True)
class LookingConfig(SamplerConfig):
    """How a sampler looks at Archs while the Supernet trains, and for which budgets.

    `quantity` is what budgets limit. `margin` of the space's cost range is left out at both ends, where one Arch is all
    there is. Budgets are drawn by `spacing`: `log` gives every factor of cost the same share, `even` every difference,
    which leaves a small part of the training to cheap budgets. Uniform for the first `warmup` of all steps, as scores
    of an untrained Supernet are noise; then every `every` steps `archs` Archs (half of them random ones of equal cost)
    are scored on one batch of `images` held-out images, and `draws` Archs are drawn for the next steps. `floor` of the
    Archs trained stay uniform, so that others do not rot.

    Looking costs archs x images forward passes for every 3 x `every` x batch size passes of training.
    """

    quantity: str = "macs"
    margin: float = 0.05
    spacing: Literal["log", "even"] = "log"
    warmup: float = 0.2
    every: int = 32
    archs: int = 4
    images: int = 64
    draws: int = 128
    floor: float = 0.2

    def __post_init__(self) -> None:
        quantity, target = split_target(self.quantity)
        if quantity not in QUANTITIES or (quantity == "latency") != bool(target):
            raise UserError(
                f"sampler.quantity is {self.quantity!r}; known are macs, params, memory and latency@TARGET, for "
                f"example latency@onnxruntime,batch=1.{nearest(quantity, QUANTITIES)}"
            )
        self._require_at_least(every=1, archs=2, images=1, draws=8)
        for name in ("margin", "warmup", "floor"):
            if not 0 <= getattr(self, name) < 1 or (name == "margin" and self.margin >= 0.5):
                raise UserError(f"sampler.{name} is {getattr(self, name)}; it is a share. Use the default.")
        if self.spacing not in ("log", "even"):
            raise UserError(f"sampler.spacing is {self.spacing!r}; it must be log or even. Use log.")

    def _require_at_least(self, **least: int) -> None:
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(
                    f"sampler.{name} is {getattr(self, name)}; it must be at least {value}. Raise it."
                )

    def cost_of(self, given: Given) -> CostOf | None:
        """Cost of genes where the Space's table has none."""
        target = self.latency_target
        return given.cost_of(target) if target and given.cost_of else None

    @property
    def latency_target(self) -> str:
        return split_target(self.quantity)[1]


@dataclass(frozen=True, kw_only=True)
class FocusConfig(LookingConfig):
    """A sampler that learns which Archs are best for each budget.

    Each of `anchors` budgets, which lie by `spacing`, has a vector of its own and is recorded. Whenever it looks, its
    policy makes `updates` of `draws` draws each (free: the cost is a table and the score a model of those seen).
    `penalty` is what a cost twice the budget takes off, in nats of the loss. `entropy` is the bonus at the start,
    falling linearly to a tenth, in standard deviations of the reward.
    """

    kind = "focus"
    answers = True

    anchors: int = 8
    updates: int = 2
    lr: float = 1e-2
    penalty: float = 5.0
    entropy: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(anchors=2, updates=1)
        for name in ("lr", "penalty"):
            if getattr(self, name) <= 0:
                raise UserError(f"sampler.{name} is {getattr(self, name)}; it must be above 0. Raise it.")

    def build(self, space: Space, given: Given) -> Focus:
        return Focus(space, given.images, cost_of=self.cost_of(given), config=self, seed=given.seed)


@dataclass(frozen=True, kw_only=True)
class BestUpConfig(LookingConfig):
    """Trains the best guess of many Archs near a budget; nothing is learned but the guess."""

    kind = "best_up"

    def build(self, space: Space, given: Given) -> BestUp:
        return BestUp(space, given.images, cost_of=self.cost_of(given), config=self)


class Looking(ABC):
    """A Sampler that looks at Archs beside the training, of which it is also a Hook (see `sample/hook.py`).

    Args:
        space: whose Archs.
        looks: held-out images that Archs are scored on; the test split is refused.
        cost_of: cost of genes, for a `quantity` that the Space's table does not have (latency).
        config: how it looks.

    Raises:
        UserError: the test split, or a quantity without a cost.
    """

    name: ClassVar[str]
    config: LookingConfig

    def __init__(
        self,
        space: Space,
        looks: HeldOut | None = None,
        *,
        cost_of: CostOf | None = None,
        config: LookingConfig,
    ) -> None:
        if getattr(getattr(looks, "images", None), "split", None) == "test":
            raise UserError("the sampler would learn from the test split; give images carved out of train.")
        self.space, self.config = space, config
        self.cost_of = cost_of or table_cost(space, self.config.quantity)
        self.low, self.high = budget_range(space, self.cost_of, self.config.margin)
        self.score_model = ScoreModel(space)
        self.queue: Matrix = np.zeros((0, len(space.genes)), dtype=np.int64)
        self._rounds = Rounds(looks, self.config.images)

    def draw(self, rng: random.Random) -> list[Draw]:
        """Uniform while warming up and for the `floor`; else one of the Archs last drawn."""
        if not len(self.queue) or rng.random() < self.config.floor:
            return [Draw(arch=self.space.sample(rng))]
        genes = self.queue[rng.randrange(len(self.queue))]
        return [Draw(arch=self.space.arch_of(tuple(genes.tolist())))]

    def before(self, moment: Moment) -> Mapping[str, Any] | None:
        """Learn, where this step is one to learn at, and draw the Archs of the next steps."""
        first = math.ceil(self.config.warmup * moment.steps)
        if moment.step < max(first, 1) or (moment.step - first) % self.config.every:
            return None
        generator = torch.Generator().manual_seed(stream(moment.seed, moment.step))
        told = {**self._look(moment, generator), **self._learn(moment, generator)}
        self.queue = self._refill(generator)
        look = (moment.step - first) // self.config.every
        return told | (self.watch(generator) if look % WATCH_EVERY == 0 else {})

    @abstractmethod
    def _refill(self, generator: torch.Generator) -> Matrix:
        """The Archs of the next steps."""

    def _learn(self, moment: Moment, generator: torch.Generator) -> dict[str, float]:
        """Learn more than scores; what is to be said of it."""
        return {}

    def watch(self, generator: torch.Generator) -> dict[str, Any]:
        """What is to be said at some looks."""
        return {}

    def _at(self, share_N: Floats) -> Floats:
        """Budgets at shares of the way from the least to the largest."""
        if self.config.spacing == "log":
            return np.asarray(self.low * (self.high / self.low) ** share_N)
        return np.asarray(self.low + (self.high - self.low) * share_N)

    def _budgets(self, n: int, generator: torch.Generator) -> Tensor:
        share_N = torch.rand(n, generator=generator, dtype=torch.float64)
        return torch.from_numpy(self._at(share_N.numpy())).float()

    def _look(self, moment: Moment, generator: torch.Generator) -> dict[str, float]:
        """Score a few Archs on the same held-out images with the weights of now: some of those drawn, and for each a
        random one that costs the same."""
        drawn = self.queue if len(self.queue) else self._refill(generator)
        mine = drawn[: self.config.archs // 2]
        genes_NG = np.concatenate(
            [mine, self.uniform_near(self.cost_of(mine), stream(moment.seed, moment.step))]
        )
        images, targets = self._rounds.at(moment.step // self.config.every)
        device = next(moment.network.parameters()).device
        images, targets = images.to(device), targets.to(device)
        with torch.no_grad(), evaluating(moment.network):
            losses = [
                _loss(moment.network, images, targets, self.space.arch_of(tuple(row)))
                for row in genes_NG.tolist()
            ]
        scores = -torch.stack(losses)
        moment.share(scores)
        found: Floats = scores.double().cpu().numpy()
        # Nothing to learn; the loop stops where the training's own loss is no number.
        if not np.isfinite(found).all():
            return {}
        self.score_model.add(genes_NG, found)
        return {
            "score": float(found.mean()),
            "gain": float(found[: len(mine)].mean() - found[len(mine) :].mean()),
        }

    def uniform_near(self, costs_N: Floats, seed: int, pool: int = 500) -> Matrix:
        """(N, genes): for each of `costs_N` one of `pool` random Archs that costs within 5 % of it, else the nearest.

        Not the nearest always: in a small space that would be nearly the same Arch.
        """
        rng = np.random.default_rng(seed)
        drawn = self.space.random_matrix(pool, rng)
        miss_NP = np.abs(self.cost_of(drawn)[None] / costs_N[:, None] - 1)
        found = [rng.choice(np.flatnonzero(row <= max(0.05, float(row.min())))) for row in miss_NP]
        near: Matrix = drawn[found]
        return near

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed training needs."""
        scores = {f"quality.{name}": value for name, value in self.score_model.tensors().items()}
        return {**scores, "queue": torch.from_numpy(self.queue)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        for name, value in self.score_model.tensors().items():
            value.copy_(tensors[f"quality.{name}"])
        self.queue = tensors["queue"].numpy()


class Focus(Looking):
    """Learns a policy by the scores, which draws the Archs and can be asked for others.

    Args:
        config: how it learns.
        seed: of the policy's weights.
    """

    name = "focus"
    config: FocusConfig

    def __init__(
        self,
        space: Space,
        looks: HeldOut | None = None,
        *,
        cost_of: CostOf | None = None,
        config: FocusConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(space, looks, cost_of=cost_of, config=config or FocusConfig())
        generator = torch.Generator().manual_seed(seed)
        self.policy = Policy(space, self.spaced(self.config.anchors), generator=generator)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=self.config.lr, fused=True)

    def spaced(self, n: int) -> list[float]:
        """`n` rising budgets from the least to the largest, by the `spacing`."""
        found: list[float] = self._at(np.linspace(0, 1, n)).tolist()
        return found

    def ask(self, budgets: Tensor, *, seed: int = 0, greedy: bool = False) -> Matrix:
        """(N,) budgets to (N, genes): an Arch drawn for each, or the likeliest."""
        with torch.no_grad():
            drawn: Drawn = self.policy(budgets, generator=torch.Generator().manual_seed(seed), greedy=greedy)
        return drawn.genes_NG

    def _refill(self, generator: torch.Generator) -> Matrix:
        with torch.no_grad():
            drawn: Drawn = self.policy(self._budgets(self.config.draws, generator), generator=generator)
        return drawn.genes_NG

    def _learn(self, moment: Moment, generator: torch.Generator) -> dict[str, float]:
        """Policy gradient. Draws come in groups of 4 for one budget: the baseline of each is the mean of its group's
        others, which needs no memory of earlier rewards and is right for every budget."""
        config, reward_N, ratio_N = self.config, np.zeros(0), np.zeros(0)
        weight = config.entropy * (1 - 0.9 * moment.step / moment.steps)
        for _ in range(config.updates):
            budgets_N = self._budgets(config.draws // 4, generator).repeat_interleave(4)
            drawn: Drawn = self.policy(budgets_N, generator=generator)
            ratio_N = self.cost_of(drawn.genes_NG) / budgets_N.numpy()
            reward_N = self.score_model(drawn.genes_NG) - config.penalty * np.abs(ratio_N - 1)
            groups = torch.from_numpy(reward_N).float().view(-1, 4)
            advantage = (groups - (groups.sum(1, keepdim=True) - groups) / 3).flatten()
            advantage = advantage / (advantage.std() + 1e-6)
            loss = -(advantage * drawn.log_prob_N).mean() - weight * drawn.entropy_NG.sum(1).mean()
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            self.optimizer.step()
        for parameter in self.policy.parameters():
            moment.share(parameter)
        return {"reward": float(reward_N.mean()), "miss": float(np.abs(ratio_N - 1).mean())}

    def watch(self, generator: torch.Generator, n: int = 16) -> dict[str, Any]:
        """Per anchor: mean cost over budget, and the mean entropy of each kind of gene that matters (in nats)."""
        anchors_K = torch.tensor(self.policy.anchors)
        with torch.no_grad():
            drawn: Drawn = self.policy(anchors_K.repeat_interleave(n), generator=generator)
        ratio = self.cost_of(drawn.genes_NG).reshape(-1, n) / anchors_K.numpy()[:, None]
        matters = torch.from_numpy(self.space.active_matrix(drawn.genes_NG)).view(len(anchors_K), n, -1)
        entropy = drawn.entropy_NG.view(len(anchors_K), n, -1)
        kinds = [kind_of(gene) for gene in self.space.genes]
        per_kind: dict[str, list[float]] = {}
        for kind in dict.fromkeys(kinds):
            places = [i for i, k in enumerate(kinds) if k == kind]
            total, count = entropy[:, :, places].sum((1, 2)), matters[:, :, places].sum((1, 2)).clamp(min=1)
            per_kind[kind] = [round(float(v), 4) for v in total / count]
        return {
            "budgets": [round(a, 3) for a in self.policy.anchors],
            "cost_ratio": [round(float(r), 4) for r in ratio.mean(1)],
            "entropy": per_kind,
        }

    def preferences(self, n: int = 256, seed: int = 0) -> dict[str, list[list[float]]]:
        """Per gene: (anchors, options) shares of `n` draws for each anchor, over the draws in which it matters."""
        anchors_K = torch.tensor(self.policy.anchors)
        genes = self.ask(anchors_K.repeat_interleave(n), seed=seed).reshape(len(anchors_K), n, -1)
        found: dict[str, list[list[float]]] = {}
        for place, gene in enumerate(self.space.genes):
            rows = []
            for drawn_NG in genes:
                alive = drawn_NG[self.space.active_matrix(drawn_NG)[:, place], place]
                counts = np.bincount(alive, minlength=len(gene.options)) / max(1, len(alive))
                rows.append([round(float(share), 4) for share in counts])
            found[gene.name] = rows
        return found

    def tensors(self) -> dict[str, Tensor]:
        state = {f"policy.{name}": value for name, value in self.policy.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            state |= {f"adam.{index}.{name}": value for name, value in values.items()}
        return super().tensors() | state | {"anchors": torch.tensor(self.policy.anchors, dtype=torch.float64)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        super().restore(tensors)
        self.policy.load_state_dict(
            {
                name.removeprefix("policy."): value
                for name, value in tensors.items()
                if name.startswith("policy.")
            }
        )
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, index, kind = name.split(".")
                moments.setdefault(int(index), {})[kind] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        # The vectors were learned for these budgets, however they would be spaced now.
        self.policy.anchors = tuple(tensors["anchors"].tolist())
        self.low, self.high = self.policy.anchors[0], self.policy.anchors[-1]


class BestUp(Looking):
    """The strongest simple rival: draw many Archs near a budget and train the one that looks best.

    Source: AttentiveNAS (arXiv 2011.09011), "BestUp", with the additive model of scores as its predictor. Nothing
    but that model is learned.
    """

    name = "best_up"

    def _refill(self, generator: torch.Generator) -> Matrix:
        rng = np.random.default_rng(int(torch.randint(1 << 62, (1,), generator=generator)))
        genes_NG = self.space.random_matrix(50 * self.config.draws, rng)
        cost_N, score_N = self.cost_of(genes_NG), self.score_model(genes_NG)
        picked = []
        for budget in self._budgets(self.config.draws, generator).tolist():
            nearest_N = np.argsort(np.abs(cost_N - budget), kind="stable")[:50]
            picked.append(nearest_N[np.argmax(score_N[nearest_N])])
        return genes_NG[picked]


def _loss(network: nn.Module, images_BCHW: Tensor, targets_B: Tensor, arch: Arch) -> Tensor:
    """Mean cross-entropy of `arch`, over all weight sets that it has in the Supernet (as `train.evaluate`)."""
    sides = int(getattr(network, "sides", 1))
    asked = [{"side": side} if side else {} for side in range(sides)]
    losses = [
        functional.cross_entropy(network(images_BCHW, arch, **each).float(), targets_B) for each in asked
    ]
    return torch.stack(losses).mean() if sides > 1 else losses[0]


def stream(seed: int, step: int) -> int:
    """A seed of its own for every step."""
    return random.Random(f"focus/{seed}/{step}").getrandbits(62)


def table_cost(space: Space, quantity: str) -> CostOf:
    """Cost from the Space's table: `macs`, `params` or `memory`.

    Raises:
        UserError: another quantity.
    """
    if quantity not in ("macs", "params", "memory"):
        raise UserError(
            f"sampler.quantity is {quantity!r}; the cost table has macs, params and memory. Give cost_of for others."
        )
    table = space.cost_table()
    return lambda genes_NG: table.costs(genes_NG)[quantity].astype(np.float64)


def budget_range(space: Space, cost_of: CostOf, margin: float) -> tuple[float, float]:
    """The budgets that a policy learns: from the cheapest Arch to the dearest, less `margin` of that at both ends.

    Raises:
        UserError: all Archs cost the same, so that there is nothing to be asked for.
    """
    ends = np.array([space.encode(space.smallest()), space.encode(space.largest())])
    drawn = space.random_matrix(10_000, np.random.default_rng(0))
    costs = cost_of(np.concatenate([ends, drawn]))
    low, high = float(costs.min()), float(costs.max())
    if low == high:
        raise UserError(
            f"all Archs of {space.name} cost the same in what sampler.quantity limits; there are no budgets to "
            "learn. Use another quantity, or sampler.kind=uniform."
        )
    return low + margin * (high - low), high - margin * (high - low)
