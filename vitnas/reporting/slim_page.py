"""The page of a slimmed network: beside the original, what went where, and every choice with its figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from typing import Any, cast

from markupsafe import Markup

from vitnas.arch import Arch
from vitnas.budget import Budget
from vitnas.counting import count
from vitnas.records import Member
from vitnas.reporting.drawing import draw
from vitnas.reporting.files import RunFiles
from vitnas.reporting.headline import limits
from vitnas.reporting.plots import BLUE, GREY, ORANGE, RED, Figure, axis, figure, line, share_axis
from vitnas.reporting.slimming import comparison, cosine, forecast, members
from vitnas.reporting.tables import MISSING, Table, number, percent
from vitnas.space import AroundSpace, space_from_json
from vitnas.space.around import are_shares
from vitnas.train.progress import duration

# Stage -> files that show it is done.
STAGES = {
    "forecast": ("forecast.json",),
    "order": ("order.json", "supernet.safetensors"),
    "sensitivity": ("sensitivity.json",),
    "search": ("allocation.json",),
    "fold": ("front.json",),
    "latency": ("export/latency.json",),
    "chosen": ("models/chosen/result.json",),
    "export": ("export/export.json",),
    "results": ("slimmed.json",),
}


def original_arch(run: RunFiles) -> Arch | None:
    """The Arch that the Space stands around."""
    space = _space(run)
    return space.arch if space else None


def _space(run: RunFiles) -> AroundSpace | None:
    return cast(AroundSpace, space_from_json(run.space.space)) if run.space else None


def slim_context(run: RunFiles, figures: dict[str, Figure]) -> dict[str, Any]:
    """What the page's template asks for, beside what all pages have; draws into `figures`."""
    slim, original, chosen = run.slim, original_arch(run), run.chosen
    figures |= {name: drawn for name, drawn in _figures(run).items() if drawn is not None}
    results, front = slim.results, slim.front.members if slim.front else ()
    planned = len(slim.allocation.places) if slim.allocation else len(front)
    columns = [
        "; the share of images with MODEL's first class (top-1)"
        * (bool(front) and front[0].agreement.top1 is not None),
        "; latency is the median of exported files, all timed in the same rounds"
        * (results is not None and bool(results.rows[0].latency_ms)),
    ]
    return {
        "stages": [(name, all((run.folder / p).exists() for p in paths)) for name, paths in STAGES.items()],
        "headline": sentence(run, original),
        "why": _why(run),
        "budget": budget_table(run),
        "slim": {
            "comparison": results and comparison(results),
            "compared": f"On {results.rows[0].agreement.n} test images that nothing else used."
            if results
            else "",
            "columns": "".join(columns),
            "members": members(front) if front else None,
            "further": members(front[planned:]) if front[planned:] else None,
            "drawing": Markup(draw(chosen, original)) if chosen and original else "",
            "removed": removed(chosen, original) if chosen and original else "",
            "notes": slim.original.notes if slim.original else (),
            "choices": Table(("Choice", "Was", "Why, and what it cost"), tuple(choices(run, original))),
            "forecast": slim.forecast and forecast(slim.forecast),
        },
    }


def sentence(run: RunFiles, original: Arch | None) -> str:
    """The chosen network in one sentence, or why there is none."""
    result, first = run.models.get("chosen"), run.slim.original
    if result is None or result.agreement is None or first is None:
        return "No network is chosen yet: the run has not come so far."
    what = run.chosen.describe() if run.chosen else f"Arch {result.arch_id}"
    share = percent(result.macs / first.cost.macs, 0)
    row = run.slim.results.rows[1] if run.slim.results else None
    found, n = (row.agreement, "test") if row else (result.agreement, "held-out")
    same = "" if found.top1 is None else f", the same first class on {percent(found.top1)}"
    accuracy = row.accuracy if row else result.holdout_accuracy
    told = "" if accuracy is None else f", accuracy {percent(accuracy)}"
    return (
        f"{first.name} made smaller: {what}, {share} of its MACs: cosine {cosine(found)} to it{same}{told} "
        f"(n = {found.n} {n} images)"
    )


def _why(run: RunFiles) -> str:
    result, front = run.models.get("chosen"), run.slim.front
    if result is None or front is None:
        return ""
    first = run.slim.original
    measured = " as measured" if first and Budget.parse(first.budget).latency_targets else ""
    return (
        f"{result.start} of {len(front.members)} networks made: of those that meet the budget{measured}, the one that "
        "agrees best with MODEL on held-out images."
    )


def budget_table(run: RunFiles) -> tuple[Table, str]:
    """The chosen network against each limit with its margin, and the verdict in words."""
    results = run.slim.results
    if results is None:
        asked = run.slim.original.budget if run.slim.original else MISSING
        return Table((), ()), f"Budget: {asked}."
    chosen = results.rows[1]
    times = {target: latency.median_ms for target, latency in chosen.latency_ms.items()}
    table, _ = limits(results.budget, replace(chosen.cost, latency_ms=times))
    return table, "Budget met." if results.met else "Budget missed."


def removed(chosen: Arch, original: Arch) -> str:
    """How much of what went, in a sentence."""
    sizes = [
        {
            "blocks": arch.depth,
            "heads": sum(block.num_heads for block in arch.blocks),
            "hidden units": sum(block.mlp_hidden for block in arch.blocks),
            "channels of the embedding": arch.embed_dim,
        }
        for arch in (chosen, original)
    ]
    parts = [
        f"{there - left} of {there} {what} ({percent(1 - left / there, 0)})"
        for (what, left), there in zip(sizes[0].items(), sizes[1].values(), strict=True)
        if left < there
    ]
    keeps = [str(block.keep) for block in chosen.blocks if block.keep is not None]
    if keeps:
        parts.append(f"patches, of which {'/'.join(keeps)} stay")
    return f"Gone are {', '.join(parts)}." if parts else "Nothing went."


def choices(run: RunFiles, original: Arch | None) -> Iterator[tuple[str, str, str]]:
    """Each choice: what it was, and what is known of it."""
    slim = run.slim
    if slim.forecast:
        found = slim.forecast
        why = "asked for" if found.asked else f"the largest that fits {duration(found.time_s)}"
        yield "Effort", found.effort, f"{why}; forecast {duration(found.taken.seconds)}"
    if slim.order:
        yield (
            "Importance",
            slim.order.importance,
            f"units sorted by it on every axis, from {slim.order.images} train images, so that each smaller network "
            "has the first of what it can have",
        )
    if slim.sensitivity:
        yield (
            "Sensitivity",
            f"{sum(map(len, slim.sensitivity.damage.values()))} options",
            f"each cut alone and made up for on {slim.sensitivity.n_fitted} images, measured on {slim.sensitivity.n} "
            f"others, in {duration(slim.sensitivity.seconds)}",
        )
        yield (
            "Compensation",
            "ridge regression",
            f"{_images(run)}layer by layer on the network as cut so far; its strength by two halves of the images, per "
            "layer",
        )
    if slim.allocation:
        tried = len(slim.allocation.tried)
        errors = ", ".join(
            f"{target}: table of latencies off by {percent(error)}"
            for target, error in slim.allocation.latency_error.items()
        )
        measured = f"; {tried} latencies measured on the way" if tried else ""
        yield (
            "Allocation",
            f"{len(slim.allocation.places)} budgets",
            f"searched by predicted damage, the best proposals folded{measured}{'; ' + errors if errors else ''}",
        )
    if slim.recovery:
        kept = "kept" if slim.recovery.is_better else "not kept"
        yield "Recovery", kept, f"{slim.recovery}, in {duration(slim.recovery.seconds)}"
    if run.chosen and (space := _space(run)):
        yield "Rounding", *rounding(run.chosen, space)


def _images(run: RunFiles) -> str:
    return f"by {run.slim.forecast.images} train images, " if run.slim.forecast else ""


def rounding(chosen: Arch, space: AroundSpace) -> tuple[str, str]:
    """Multiples, and what snapping to them cost: how far hidden units are from the shares that were asked for."""
    said = f"multiples of {space.multiple}"
    if not are_shares(space.hidden):
        return said, "hidden units were asked for as numbers, so none are rounded"
    units, depth = 0.0, 0
    for stage, there in zip(chosen.stages, space.arch.stages, strict=True):
        for index, block in enumerate(stage.blocks):
            whole = there.blocks[index if block.slot is None else block.slot].mlp_hidden
            exact = min(
                (whole * share for share in space.hidden), key=lambda each: abs(each - block.mlp_hidden)
            )
            units += block.mlp_hidden - exact
            depth += 1
    macs = 2 * units * chosen.embed_dim * chosen.num_tokens / count(chosen).macs
    return (
        said,
        f"runtimes work in such steps; {units:+.0f} hidden units in all against the shares asked for, unrounded, "
        f"{100 * macs:+.2f} % of the MACs",
    )


def _figures(run: RunFiles) -> dict[str, Figure | None]:
    front = run.slim.front.members if run.slim.front else ()
    chosen = run.models["chosen"].start if "chosen" in run.models else ""
    return {
        "agreement": _agreement(front, chosen),
        "predicted": _predicted(front),
        "sensitivity": _sensitivity(run),
        "speed": _speed(run),
    }


def _agreement(front: Sequence[Member], chosen: str) -> Figure | None:
    if not front:
        return None
    ranked = sorted(front, key=lambda member: member.cost.macs)
    values = [1 - member.measured for member in ranked]
    points = [(float(member.cost.macs), value) for member, value in zip(ranked, values, strict=True)]
    drawn = line(points, "front", ORANGE, "%{customdata}", dots=True)
    drawn["customdata"] = [
        f"{escape(m.folder)}: {v:.4f}, {number(m.cost.macs)}MACs" for m, v in zip(ranked, values, strict=True)
    ]
    star = [point for member, point in zip(ranked, points, strict=True) if member.folder == chosen]
    mark = {**line(star, "chosen", RED, "chosen", dots=True), "mode": "markers"}
    mark["marker"] = {"size": 15, "symbol": "star", "color": RED}
    return figure([drawn, mark], axis("MACs", tickformat="~s"), axis("Cosine", **share_axis(values)))


def _predicted(front: Sequence[Member]) -> Figure | None:
    if not front:
        return None
    ends = [0.0, max(max(member.predicted, member.measured) for member in front)]
    same = line([(end, end) for end in ends], "equal", GREY, "equal")
    marks = line([(m.predicted, m.measured) for m in front], "networks", BLUE, "%{customdata}", dots=True)
    marks |= {"mode": "markers", "customdata": [escape(member.folder) for member in front]}
    return figure([same, marks], axis("Predicted"), axis("Measured after folding"))


def _sensitivity(run: RunFiles) -> Figure | None:
    found = run.slim.sensitivity
    if found is None or not found.damage:
        return None
    options = {gene.name: gene.options for gene in run.space.genes} if run.space else {}
    names, most = list(found.damage), max(map(len, found.damage.values()))
    rows, texts = [], []
    for name in names:
        damage = found.damage[name]
        gap = [None] * (most - len(damage))  # aligned at the whole, on the right
        rows.append([*gap, *damage])
        said = options.get(name, ("",) * len(damage))
        texts.append([*gap, *(f"{escape(str(o))}: {d:.4f}" for o, d in zip(said, damage, strict=False))])
    heat: Figure = {
        "type": "heatmap", "z": rows, "y": names, "text": texts, "colorscale": "Viridis",
        "colorbar": {"title": {"text": "damage"}}, "hovertemplate": "%{y}, %{text}<extra></extra>",
    }  # fmt: skip
    shown = axis("Less to the left, all at the right", showticklabels=False)
    drawn = figure([heat], shown, axis("", autorange="reversed", dtick=1))
    drawn["layout"]["height"] = 120 + 16 * len(names)
    return drawn


def _speed(run: RunFiles) -> Figure | None:
    results = run.slim.results
    if results is None or not results.rows[0].latency_ms:
        return None
    data: list[Figure] = []
    first = results.rows[0]
    for target, whole in first.latency_ms.items():
        points = sorted(
            (row.cost.macs / first.cost.macs, row.latency_ms[target].median_ms / whole.median_ms)
            for row in results.rows
            if target in row.latency_ms
        )
        data.append(
            line(
                points,
                target,
                ORANGE if not data else BLUE,
                f"%{{x:.0%}} of the MACs, %{{y:.0%}} of the time, {escape(target)}",
                dots=True,
            )
        )
    data.append(line([(0.0, 0.0), (1.0, 1.0)], "in step", GREY, "in step"))
    shares = {"tickformat": ".0%", "range": [0, 1.05]}
    return figure(
        data, axis("MACs", **shares), axis("Time", **{**shares, "rangemode": "tozero"}), legend=True
    )
