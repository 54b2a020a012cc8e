"""The identity's probability of a run: searched for before any training, kept in identity.json, told to the user."""

from __future__ import annotations

from functools import partial
from typing import Any

from vitnas.runs import read_json, write_json
from vitnas.sample.identity import identity_probability, require_identity
from vitnas.searching.latency import measure_ms
from vitnas.stages.context import Context
from vitnas.stages.run import Run

FILE = "identity.json"


def is_searched(run: Run) -> bool:
    """The probability is not given."""
    return run.sampler.kind == "identity" and run.sampler.identity_prob is None


def settle_identity(context: Context) -> None:
    """Search for the probability that meets the run's Budget and write it, where the run asks for that.

    Raises:
        UserError: no probability meets the Budget (with the range that can be met), or the space has no identity.
    """
    path = context.folder / FILE
    if context.run.sampler.kind != "identity":
        return
    require_identity(context.space)
    if not is_searched(context.run):
        return

    def find() -> dict[str, Any]:
        if not path.exists():
            measures = {
                target: partial(measure_ms, meter, build=None) for target, meter in context.meters.items()
            }
            found = identity_probability(
                context.space, context.budget, seed=context.run.seed, measures=measures
            )
            write_json(path, {"prob": found.prob, "means": dict(found.means)})
        known: dict[str, Any] = read_json(path)
        return known

    # One process, as the others need the same answer and its clocks undisturbed.
    known = context.engine.from_first(find)
    means = "; ".join(f"{limit}: {value:.4g}" for limit, value in known["means"].items())
    context.progress.note(
        f"identity probability {known['prob']:g}"
        + (f" (mean cost of the Archs drawn, {means})" if means else "")
    )
