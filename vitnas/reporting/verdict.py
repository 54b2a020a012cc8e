"""Was the search worth it? The chosen model against the baselines, image by image, and what each of them took."""

from __future__ import annotations

from collections.abc import Mapping

from vitnas.budget import Budget
from vitnas.records import Result, Results, Versus
from vitnas.reporting.files import RunFiles, role_name
from vitnas.reporting.tables import over_budget, spent_cells

SAME = {
    "hand_scaled": "the hand-scaled ViT itself",
    "random_search": "the very network that random search found",
}


def sentence(results: Results) -> str:
    """One sentence: better by how much, the same within the noise, or worse; "" where there is no baseline."""
    if not results.verdict:
        return ""
    own = {row.role: row.arch_id for row in results.rows}
    same = [role for role in SAME if role in own and own[role] == own["chosen"]]
    parts = [SAME[each.role] if each.role in same else _part(each) for each in results.verdict]
    told = f"{', '.join(parts[:-1])} and {parts[-1]}" if parts[1:] else parts[0]
    n = results.verdict[0].n
    if len(same) == len(parts):
        return f"The chosen model is {told}."
    points = "points are of images whose likeliest class is one of theirs; " * results.verdict[0].several
    return (
        f"On the same {n} test images the chosen model is {told} ({points}95 % intervals of images; each was trained "
        "once, and another seed can move it by more)."
    )


def _part(versus: Versus) -> str:
    if versus.measure == "R^2":
        return _part_of_numbers(versus)
    low, high = (100 * end for end in versus.ci95)
    name, points = role_name(versus.role), 100 * versus.difference
    name = name if versus.role == "random_search" else f"the {name}"
    if versus.says == "the same within the noise":
        return f"the same within the noise as {name} ({points:+.1f} points, {low:+.1f} to {high:+.1f})"
    low, high = sorted((abs(low), abs(high)))
    return f"{abs(points):.1f} points {versus.says} than {name} ({low:.1f} to {high:.1f})"


def _part_of_numbers(versus: Versus) -> str:
    (low, high), name = versus.ci95, role_name(versus.role)
    name = name if versus.role == "random_search" else f"the {name}"
    if versus.says == "the same within the noise":
        return f"the same within the noise as {name} (R² {versus.difference:+.3f}, {low:+.3f} to {high:+.3f})"
    low, high = sorted((abs(low), abs(high)))
    return f"{versus.says} than {name} by {abs(versus.difference):.3f} of R² ({low:.3f} to {high:.3f})"


def missed(run: RunFiles) -> str:
    """One sentence on models that are over the budget as it was measured last; "" where there are none."""
    told = [
        f"{role_name(role)} ({'; '.join(reasons)})"
        for role, result in run.models.items()
        if (reasons := over_budget(run, result))
    ]
    if not told:
        return ""
    targets = Budget.parse(run.budget).latency_targets
    timed = [each for times in run.latencies.values() for target, each in times.items() if target in targets]
    busy = "" if all(each.trusted for each in timed) else " on a busy machine"
    return f"Over the budget, as measured at the end{busy}: {', '.join(told)}."


def took(rows: Mapping[str, Result]) -> str:
    """One sentence on what each model took, search and supernet included; "" where nothing is on record."""
    told = []
    for role, row in rows.items():
        if row.spent is not None:
            learned, looked, seconds = spent_cells(row.spent)
            told.append(f"{role_name(role)} {learned} images learned from, {looked} looked at, {seconds}")
    return f"What each took, all in all: {'; '.join(told)}." if told else ""
