"""The sampler of a run: made for training; if it learns, kept in sampler.safetensors and asked for a budget."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from vitnas.budget import Budget, Limit, format_quantity, split_target
from vitnas.errors import UserError
from vitnas.measure.latency import LatencyMeter
from vitnas.measure.target import parse_target
from vitnas.records import Compared, Sample, SamplerLatency, SamplerSummary
from vitnas.runs import RunFile, to_json
from vitnas.sample import Focus, Given, Sampler, SamplerConfig
from vitnas.searching import Evaluator
from vitnas.searching.goal import Goal
from vitnas.searching.latency import LatencyModel, measure_ms
from vitnas.space import Genes, Space
from vitnas.stages.work import RunImages, Work, quick_meter
from vitnas.train.checkpoint import load_checkpoint, save_checkpoint

NUM_DRAWS = 512  # of the policy per answer; free, as costs are a table and scores a model
NUM_MOVED = 32  # of them that are moved into a budget which none meets
REACH = 0.85  # budgets asked of the policy start at this share of the limit: it meets them on average only
COMPARED = 8  # Archs per side and budget, in the comparison with random ones of equal cost


@dataclass(frozen=True)
class RunSampler:
    """The sampler of a run: made for training; if it learns, kept in sampler.safetensors and asked for a budget."""

    work: Work
    config: SamplerConfig
    space: Space
    images: RunImages
    budget: Budget

    @property
    def path(self) -> Path:
        """Where one that learned is kept."""
        return self.work.folder / "sampler.safetensors"

    @property
    def has_answers(self) -> bool:
        """It was trained and can be asked."""
        return self.config.answers and self.path.exists()

    def make(self, *, learns: bool = True) -> Sampler:
        """The Sampler, untrained. One of latency needs a few Archs timed first (sampler_latency.json).

        Args:
            learns: from held-out images; without, it is only to be asked.
        """
        settles = None if self.config.is_settled else self.config.settles
        return self.config.build(
            self.space,
            Given(
                images=self.images.holdout if learns else None,
                cost_of=lambda target: self._latency(target).cost_of(self.space),
                settled=settles.read(self.work.folder) if settles else None,
                budget=self.budget,
                seed=self.work.seed,
            ),
        )

    def settle(self, budget: Budget, meters: Mapping[str, LatencyMeter]) -> None:
        """Find what it needs to know before any training and write it (identity.json), where it needs anything.

        Raises:
            UserError: no probability meets the Budget (with the range that can be met), or the space has no identity.
        """
        folder, file = self.work.folder, self.config.settles
        if file is None or self.config.is_settled:
            return

        def find() -> RunFile:
            if not file.exists(folder):
                measures = {target: partial(measure_ms, meter) for target, meter in meters.items()}
                self.config.settle(self.space, budget, seed=self.work.seed, measures=measures).write(folder)
            return file.read(folder)

        # One process, as the others need the same answer and its clocks undisturbed.
        self.work.progress.note(str(self.work.engine.from_first(find)))

    def check(self, budget: Budget | None) -> None:
        """Refuse, before any training, a sampler that cannot be, or that could not answer `budget`.

        Raises:
            UserError: the space's costs do not differ; the Budget has no upper bound on what it learns, or one outside.
        """
        sampler = self.make(learns=False)
        if budget is not None:
            assert isinstance(sampler, Focus)
            limit_of(sampler, budget)

    def save(self, focus: Focus) -> None:
        """Write sampler.safetensors, in one step."""
        meta = {"genes": genes_mark(focus.space), "quantity": focus.config.quantity}
        save_checkpoint(self.path, {"sampler": focus.tensors()}, meta)

    def load(self) -> Focus:
        """The trained sampler.

        Raises:
            UserError: the run has none, or the genes of its space are not those that it was trained on.
        """
        if not self.has_answers:
            raise UserError(
                f"{self.work.folder} has no learned sampler (sampler.kind is {self.config.kind!r}); train a supernet "
                "with sampler.kind=focus, or ask the finished search."
            )
        parts, meta = load_checkpoint(self.path)
        focus = self.make(learns=False)
        assert isinstance(focus, Focus)
        if meta["genes"] != genes_mark(focus.space):
            raise UserError(
                f"{self.path} was trained on other genes than those of {focus.space.name} now; an answer would mean "
                "nothing. Train the supernet again in a new folder."
            )
        config, had = focus.config, (meta["quantity"], len(parts["sampler"]["policy.budget"]))
        if had != (config.quantity, config.anchors):
            raise UserError(
                f"{self.path} was trained for {had[0]} with {had[1]} anchors; run.yaml has sampler.quantity "
                f"{config.quantity!r} and {config.anchors} anchors. Set them back."
            )
        focus.restore(parts["sampler"])
        return focus

    def answers(self, budget: Budget) -> list[Genes]:
        """See `answers`."""
        return answers(self.load(), budget, seed=self.work.seed)

    def _latency(self, target: str) -> LatencyModel:
        folder, space = self.work.folder, to_json(self.space)

        def fit() -> LatencyModel:
            known = SamplerLatency.read(folder) if SamplerLatency.exists(folder) else None
            # A run that was refused leaves its times behind; those of another target or space would be wrong.
            if known is None or (known.target, known.space) != (target, space):
                model = LatencyModel.fit(self.space, quick_meter(target), seed=self.work.seed)
                known = SamplerLatency(target, space, model)
                known.write(folder)
            return known.model

        found: LatencyModel = self.work.engine.from_first(fit)
        return found


def genes_mark(space: Space) -> str:
    """A mark of the genes and their options."""
    genes = [[gene.name, list(gene.options)] for gene in space.genes]
    return hashlib.sha256(json.dumps(genes).encode()).hexdigest()[:16]


def limit_of(focus: Focus, budget: Budget) -> float:
    """The upper bound that the policy is asked with.

    Raises:
        UserError: the budget does not bound the quantity that the sampler was trained for, or outside what it learned.
    """
    quantity, _ = split_target(focus.config.quantity)
    bounds = [limit.high for limit in budget.limits if is_quantity(limit, focus.config.quantity)]
    high = next(filter(None, bounds), None)
    if high is None:
        raise UserError(
            f"the budget {budget.text!r} has no upper bound on {focus.config.quantity}, which is what the sampler was "
            "trained for. Give one, or ask the finished search."
        )
    if not focus.low <= high <= focus.high:
        low, most = (format_quantity(value, quantity) for value in (focus.low, focus.high))
        raise UserError(
            f"the budget {budget.text!r} is outside what the sampler learned: {focus.config.quantity} from {low} to "
            f"{most}. Give one within."
        )
    return float(high)


def is_quantity(limit: Limit, text: str) -> bool:
    """Whether `limit` is on the quantity `text`, such as `macs` or `latency@onnxruntime,batch=1`."""
    quantity, target = split_target(text)
    return limit.quantity == quantity and (not target or parse_target(limit.target) == parse_target(target))


def answers(focus: Focus, budget: Budget, *, num_draws: int = NUM_DRAWS, seed: int = 0) -> list[Genes]:
    """Different Archs that the policy draws for `budget` and that meet its counted limits, best guess first.

    The greedy answer comes first where it meets the budget. Where nothing drawn meets it (a narrow window, several
    limits), the nearest are moved into it gene by gene. No forward pass is made.
    """
    high = limit_of(focus, budget)
    asked = torch.linspace(max(focus.low, REACH * high), high, num_draws)
    greedy = focus.ask(asked[-1:], greedy=True)
    drawn = focus.ask(asked, seed=seed)
    guess = focus.score_model(drawn)
    order = np.argsort(-guess, kind="stable")
    ranked = [tuple(row) for row in np.concatenate([greedy, drawn[order]]).tolist()]
    unique = list(dict.fromkeys(ranked))
    goal = Goal(focus.space, budget)
    return _within(focus, goal, unique, high) or _within(focus, goal, _moved(focus, goal, unique, seed), high)


def _within(focus: Focus, goal: Goal, ranked: list[Genes], high: float) -> list[Genes]:
    if not ranked:
        return []
    costs = focus.cost_of(np.asarray(ranked))
    met = goal.meets(ranked)
    return [genes for genes, inside, cost in zip(ranked, met, costs, strict=True) if inside and cost <= high]


def _moved(focus: Focus, goal: Goal, drawn: list[Genes], seed: int) -> list[Genes]:
    """Archs within the counted limits, reached from those of `drawn` that miss them least, best guess first."""
    if not goal.budget.counted:
        return []
    rng, moved = random.Random(f"answers/{seed}"), list[Genes]()
    for place in np.argsort(goal.violation(drawn), kind="stable")[:NUM_MOVED].tolist():
        found = goal.repair(drawn[place], rng, moved)
        moved += [] if found is None else [found]
    guess = focus.score_model(np.asarray(moved)) if moved else np.zeros(0)
    return [moved[place] for place in np.argsort(-guess, kind="stable").tolist()]


def summarise(focus: Focus, score: Evaluator, seed: int, num_budgets: int = 3) -> SamplerSummary:
    """What the policy prefers per budget, and its Archs against random ones of equal cost, by `score`."""
    budgets = np.asarray(focus.spaced(num_budgets + 2)[1:-1])
    compared = []
    for budget in budgets.tolist():
        mine = focus.ask(torch.full((COMPARED,), budget), seed=seed)
        others = focus.uniform_near(focus.cost_of(mine), seed=seed + 1)
        sides = {}
        for side, genes in (("policy", mine.tolist()), ("random", others.tolist())):
            found = [score(focus.space.arch_of(tuple(row)))["accuracy"] for row in genes]
            sides[side] = Sample(float(np.mean(found)), float(np.std(found)), len(found))
        compared.append(Compared(budget, float(np.mean(focus.cost_of(mine)) / budget), **sides))
    return SamplerSummary(
        quantity=focus.config.quantity,
        low=focus.low,
        high=focus.high,
        budgets=tuple(focus.policy.anchors),
        options={gene.name: tuple(gene.options) for gene in focus.space.genes},
        preferences={name: tuple(map(tuple, rows)) for name, rows in focus.preferences(seed=seed).items()},
        compared=tuple(compared),
    )
