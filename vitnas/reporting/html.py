"""Make the report of a run: one HTML file that works offline, from whatever the run folder holds so far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from vitnas.arch import Arch
from vitnas.counting import parts
from vitnas.reporting import drawing, headline, mistakes, plots, sampler_plots, tables, verdict
from vitnas.reporting.files import RunFiles, read_run, stage_label
from vitnas.reporting.pretrain_page import pretrain_context
from vitnas.reporting.slim_page import slim_context
from vitnas.reporting.tokens import draw_tokens
from vitnas.runs import write_atomic
from vitnas.searching.choosing import cannot_order
from vitnas.train import metrics
from vitnas.train.evaluate import cannot_tell

# With fewer pairs than this a rank correlation says nothing.
MIN_PAIRS = 5


def report(folder: Path | str, out: Path | None = None) -> Path:
    """Write the report of the run in `folder` and return its path.

    Parts of the run that are not there yet are named as missing; unreadable files are listed at the top.

    Args:
        folder: a run folder, finished or not.
        out: the file to write; `folder/report.html` if left out.

    Raises:
        UserError: `folder` is no folder or holds no file of a run, or `out` cannot be written.
    """
    run = read_run(Path(folder))
    page = out or run.folder / "report.html"
    write_atomic(page, render(run, page))
    return page


def render(run: RunFiles, page: Path) -> str:
    """Return the page's HTML. `page` is where it will lie: links to the run's files are relative to it."""
    figures: dict[str, plots.Figure] = {}
    context = {
        "name": run.folder.resolve().name,
        "problems": run.problems,
        "stages": headline.stages(run),
        "command": run.manifest.command if run.manifest else "",
        "headline": headline.sentence(run),
        "why": headline.why(run),
        "worth": run.results and verdict.sentence(run.results),
        "budget": headline.budget_table(run),
        "files": headline.file_links(run, page),
        "snippets": headline.snippets(run),
        "comparison": tables.comparison(run),
        "taught": tables.taught(run),
        "not_measured": tables.MISSING,
        **_search(run, figures),
        **_training(run, figures),
        **_sampler(run, figures),
        **_architecture(run.chosen, figures),
        "token_maps": run.token_maps and draw_tokens(run.token_maps),
        **_correlation(run, figures),
        "feasibility": run.feasibility and tables.feasibility(run.feasibility),
        "latency": run.latency and tables.latency(run.latency),
        "export": run.export and tables.export(run.export),
        "manifest": run.manifest and tables.keyed(run.manifest),
        "test_reads": _test_reads(run),
        "evaluation": run.evaluation,
        "measure": "R²" if run.tells_numbers else "Accuracy",
        "numbers": run.evaluation and run.evaluation.numbers and mistakes.by_number(run.evaluation),
        "classes": run.evaluation and run.evaluation.classes and mistakes.by_class(run.evaluation),
        "classes_left": mistakes.left_out(run.evaluation) if run.evaluation else 0,
        "mistakes": run.evaluation and mistakes.gallery(run.evaluation),
        "slim": None,
        "pretrain": None,
        **(slim_context(run, figures) if run.slim else {}),
        **(pretrain_context(run, figures) if run.pretrain else {}),
    }
    # "<" cannot end the script element early once it is written as an escape, which JSON reads back as "<".
    from plotly.offline import get_plotlyjs  # machines that only train need not have it

    data = json.dumps(figures, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html.j2")
    return template.render(
        **context,
        drawn={name: drawn["layout"].get("height") for name, drawn in figures.items()},
        figures=Markup(data),
        plotly_js=Markup(get_plotlyjs()),
    )


def _keep(figures: dict[str, plots.Figure], name: str, figure: plots.Figure | None) -> None:
    if figure is not None:
        figures[name] = figure


def _search(run: RunFiles, figures: dict[str, plots.Figure]) -> dict[str, Any]:
    told = {
        "finals": run.finals and run.finals.says and tables.finals(run.finals),
        "finals_say": run.finals and run.finals.says,
    }
    if run.search is None:
        return {"search": None, "holdout": _holdout(run), **told}
    _keep(figures, "front", plots.front(run))
    _keep(figures, "hypervolume", plots.hypervolume(run.search))
    return {
        "search": run.search,
        "thinned": run.search.num_scored > plots.MAX_POINTS,
        "holdout": _holdout(run),
        "scored_how": run.scored_how,
        "search_seconds": tables.number(run.search.seconds, "s"),
        "rejections": tables.rejections(run.search),
        **told,
    }


def _sampler(run: RunFiles, figures: dict[str, plots.Figure]) -> dict[str, Any]:
    summary, looks = run.sampler, run.looks
    if summary:
        _keep(figures, "sampler_prefers", sampler_plots.preferences(summary))
    _keep(figures, "sampler_cost", sampler_plots.cost_ratio(looks, summary.quantity if summary else "macs"))
    _keep(figures, "sampler_entropy", sampler_plots.entropy(looks))
    _keep(figures, "sampler_gain", sampler_plots.gain(looks))
    return {
        "has_sampler": bool(summary or looks),
        "sampler_compared": summary and sampler_plots.compared(summary, tells_numbers=run.tells_numbers),
        "family": run.family and sampler_plots.family(run.family),
    }


def _holdout(run: RunFiles) -> str:
    """The split that scores come from, with its n."""
    n = run.search.num_images if run.search else None
    if run.search and n is not None:
        little = cannot_order(run.search, finals=run.finals is not None).removesuffix(".")
    elif run.manifest:
        n = sum(run.manifest.data.counts["holdout"])
        little = "" if run.tells_numbers else cannot_tell(n)
    else:
        return "the holdout (n not recorded)"
    return f"the holdout (n = {n} images{f'; {little}' if little else ''})"


def _training(run: RunFiles, figures: dict[str, plots.Figure]) -> dict[str, Any]:
    retrained = sorted({line.stage for line in run.metrics if line.stage.startswith("retrain")})
    stages = {stage: stage_label(stage) for stage in retrained}
    _keep(figures, "supernet", plots.curves(run.metrics, {"supernet": "supernet"}))
    _keep(figures, "monitor", plots.monitor(run.metrics))
    _keep(figures, "retrain", plots.curves(run.metrics, stages))
    _keep(figures, "retrain_accuracy", plots.retrain_accuracy(run.metrics, stages))
    warnings = [
        f"{line.stage}, step {line.step}: {line.text}"
        for line in run.metrics
        if isinstance(line, metrics.Warned)
    ]
    return {"warnings": list(dict.fromkeys(warnings))}


def _architecture(arch: Arch | None, figures: dict[str, plots.Figure]) -> dict[str, Any]:
    if arch is None:
        return {"drawing": "", "arch": None, "arch_text": ""}
    _keep(figures, "costs", plots.costs(block_costs(arch)))
    return {
        "drawing": Markup(drawing.draw(arch)),
        "arch": arch,
        "arch_text": json.dumps(arch.to_json(), indent=1),
    }


def block_costs(arch: Arch) -> list[tuple[str, int, int, int, int]]:
    """Group the counted parts into stem, blocks from 1, head: (label, attention, MLP, other MACs, params).

    A reduction or a selection goes with the block behind it.
    """
    grouped: dict[str, list[int]] = {}
    block = 0
    for part in parts(arch):
        kind, _, rest = part.name.partition(".")
        index, _, inner = rest.partition(".")
        if kind == "blocks":
            block = int(index) + 1
        label = kind if not rest else str(block if kind == "blocks" else block + 1)
        row = grouped.setdefault(label, [0, 0, 0, 0])
        row[{"attn": 0, "mlp": 1}.get(inner, 2)] += part.macs
        row[3] += part.params
    return [(label, row[0], row[1], row[2], row[3]) for label, row in grouped.items()]


def _correlation(run: RunFiles, figures: dict[str, plots.Figure]) -> dict[str, Any]:
    found = run.ranking if run.ranking and run.ranking.n else run.correlation
    if found is None:
        return {"correlation_text": "", "correlation_how": ""}
    drawn = plots.correlation(found.points, run.chosen_id, tells_numbers=run.tells_numbers)
    _keep(figures, "correlation", drawn)
    if run.ranking and found is run.ranking:
        text = run.ranking.says
    elif not found.n:
        text = f"No Archs were trained to find out: {found.note}"
    elif found.n < MIN_PAIRS:
        text = f"n = {found.n} Archs: too few to tell whether the Supernet ranks them right ({MIN_PAIRS} are needed)."
    elif found.kendall_tau is None or found.spearman is None:
        text = f"n = {found.n} Archs: {found.note}"
    else:
        text = f"Kendall's tau {found.kendall_tau:.2f}, Spearman's rho {found.spearman:.2f}, n = {found.n} Archs."
    how = f"{found.how}." if found.n else ""
    if run.ranking and found is run.ranking and run.ranking.rulers:
        names = {"accuracy": "R²"} if run.tells_numbers else {}
        each = ", ".join(f"{names.get(name, name)} {tau:.2f}" for name, tau in run.ranking.rulers.items())
        how += f" Kendall's tau of each ruler by itself: {each}."
    return {"correlation_text": text, "correlation_how": how}


def _test_reads(run: RunFiles) -> str:
    """How often, when and what for the test split was read."""
    reads = (
        [f"{r.when}, {r.num_images} images, {r.purpose}" for r in run.test_reads.readings]
        if run.test_reads
        else []
    )
    times = "once" if len(reads) == 1 else f"{len(reads)} times"
    return f"{times} ({'; '.join(reads)})" if reads else "never"
