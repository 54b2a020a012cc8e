"""The learned sampler of a run: made for training, kept in sampler.safetensors, asked for a budget."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from vitnas.budget import Budget, format_quantity
from vitnas.errors import UserError
from vitnas.measure.latency import LatencyMeter
from vitnas.runs import read_json, write_json, write_with
from vitnas.sample import BestUp, Focus
from vitnas.sample.focus import CostOf
from vitnas.searching.latency import LatencyModel
from vitnas.searching.problem import Problem
from vitnas.space.space import Genes, Space
from vitnas.stages.context import Context
from vitnas.train import evaluate
from vitnas.train.checkpoint import load_checkpoint

NUM_DRAWS = 512  # of the policy per answer; free, as costs are a table and scores a model
REACH = 0.85  # budgets asked of the policy start at this share of the limit: it meets them on average only
COMPARED = 8  # Archs per side and budget, in the comparison with random ones of equal cost


def make_focus(context: Context, *, learns: bool = True) -> Focus:
    """The run's sampler, untrained. A latency budget needs a few Archs timed first (sampler_latency.json)."""
    config, space = context.run.sampler.focus, context.space
    cost_of: CostOf | None = None
    quantity, _, target = config.quantity.partition("@")
    if quantity == "latency":
        cost_of = _latency(context, target).cost_of(space)
    kind = Focus if context.run.sampler.kind == "focus" else BestUp
    return kind(
        space, context.holdout if learns else None, cost_of=cost_of, config=config, seed=context.run.seed
    )


def _latency(context: Context, target: str) -> LatencyModel:
    path = context.folder / "sampler_latency.json"

    def fit() -> dict[str, Any]:
        if not path.exists():
            meter = LatencyMeter(target, runs=30, seconds=0.5, cache={})
            write_json(path, asdict(LatencyModel.fit(context.space, meter, None, seed=context.run.seed)))
        found: dict[str, Any] = read_json(path)
        return found

    found = context.engine.from_first(fit)
    return LatencyModel(tuple(found["weights"]), tuple(found["scales"]), found["error"], found["n"])


def save_sampler(focus: Focus, folder: Path) -> None:
    """Write sampler.safetensors, in one step."""
    meta = {"vitnas": json.dumps({"genes": genes_mark(focus.space), "quantity": focus.config.quantity})}
    tensors = {f"sampler/{name}": value.detach().contiguous() for name, value in focus.tensors().items()}
    write_with(folder / "sampler.safetensors", lambda file: save_file(tensors, file, metadata=meta))


def load_sampler(context: Context) -> Focus:
    """The run's trained sampler.

    Raises:
        UserError: the run has none, or the genes of its space are not those that it was trained on.
    """
    path = context.folder / "sampler.safetensors"
    if context.run.sampler.kind != "focus" or not path.exists():
        raise UserError(
            f"{context.folder} has no learned sampler (sampler.kind is {context.run.sampler.kind!r}); train a "
            "supernet with "
            "sampler.kind=focus, or ask the finished search."
        )
    parts, meta = load_checkpoint(path)
    focus = make_focus(context, learns=False)
    if meta["genes"] != genes_mark(focus.space):
        raise UserError(
            f"{path} was trained on other genes than those of {focus.space.name} now; an answer would mean "
            "nothing. Train "
            "the supernet again in a new folder."
        )
    focus.restore(parts["sampler"])
    return focus


def genes_mark(space: Space) -> str:
    """A mark of the genes and their options."""
    genes = [[gene.name, list(gene.options)] for gene in space.genes]
    return hashlib.sha256(json.dumps(genes).encode()).hexdigest()[:16]


def limit_of(focus: Focus, budget: Budget) -> float:
    """The upper bound that the policy is asked with.

    Raises:
        UserError: the budget does not bound the quantity that the sampler was trained for, or outside what it learned.
    """
    quantity, _, target = focus.config.quantity.partition("@")
    bounds = [
        li.high for li in budget.limits if li.quantity == quantity and (not target or li.target == target)
    ]
    high = next((value for value in bounds if value is not None), None)
    if high is None:
        raise UserError(
            f"the budget {budget.text!r} has no upper bound on {focus.config.quantity}, which is what the sampler was "
            "trained for. Give one, or ask the finished search."
        )
    if not focus.low <= high <= focus.high:
        low, most = (format_quantity(value, quantity) for value in (focus.low, focus.high))
        raise UserError(
            f"the budget {budget.text!r} is outside what the sampler learned: {focus.config.quantity} from "
            f"{low} to {most}. "
            "Give one within."
        )
    return float(high)


def answers(focus: Focus, budget: Budget, *, num_draws: int = NUM_DRAWS, seed: int = 0) -> list[Genes]:
    """Different Archs that the policy draws for `budget` and that meet its counted limits, best guess first.

    The greedy answer comes first where it meets the budget. No forward pass is made.
    """
    high = limit_of(focus, budget)
    asked = torch.linspace(max(focus.low, REACH * high), high, num_draws)
    greedy = focus.ask(asked[-1:], greedy=True)
    drawn = focus.ask(asked, seed=seed)
    guess = focus.quality(drawn)
    order = np.argsort(-guess, kind="stable")
    ranked = [tuple(row) for row in np.concatenate([greedy, drawn[order]]).tolist()]
    unique = list(dict.fromkeys(ranked))
    met = Problem(focus.space, budget).meets(unique)
    cost = focus.cost_of(np.asarray(unique))
    return [genes for genes, inside, value in zip(unique, met, cost, strict=True) if inside and value <= high]


def summarise(context: Context, focus: Focus, num_budgets: int = 3) -> dict[str, Any]:
    """sampler.json: what the policy prefers per budget, and its Archs against random ones of equal cost (held-out
    images, inherited weights)."""
    budgets = np.asarray(focus.spaced(num_budgets + 2)[1:-1])
    compared = []
    for budget in budgets.tolist():
        mine = focus.ask(torch.full((COMPARED,), budget), seed=context.run.seed)
        others = focus.uniform_near(focus.cost_of(mine), seed=context.run.seed + 1)
        scores = {
            side: [
                evaluate(context.supernet, context.holdout, focus.space.arch_of(tuple(row))).accuracy
                for row in genes
            ]
            for side, genes in (("policy", mine.tolist()), ("random", others.tolist()))
        }
        compared.append(
            {
                "budget": budget,
                "cost_ratio": float(np.mean(focus.cost_of(mine)) / budget),
                **{
                    side: {"mean": float(np.mean(v)), "std": float(np.std(v)), "n": len(v)}
                    for side, v in scores.items()
                },
            }
        )
    return {
        "quantity": focus.config.quantity,
        "low": focus.low,
        "high": focus.high,
        "budgets": list(focus.policy.anchors),
        "options": {gene.name: list(gene.options) for gene in focus.space.genes},
        "preferences": focus.preferences(seed=context.run.seed),
        "compared": compared,
    }
