"""FocusFormer (Liu et al., arXiv 2208.10861): a sampler learned beside the Supernet, asked for each budget directly.

Its parts: `sample/focus.py` (learning), `sample/policy.py` (the policy), `sample/score_model.py` (a model of scores),
`searching/policy_search.py` and `stages/specialize.py` (asking). The space is AutoFormer's. Choices: PAPERS.md.
"""

from __future__ import annotations

from dataclasses import replace

from vitnas.recipes.autoformer import autoformer
from vitnas.recipes.tour import on_digits
from vitnas.sample import FocusConfig
from vitnas.stages.run import Run, SearchConfig


def focusformer() -> Run:
    """FocusFormer on the AutoFormer-T space at 224 pixels. Needs a GPU and days."""
    base = autoformer()
    return replace(
        base,
        recipe="focusformer",
        budget="macs<=1.4G",
        sampler=FocusConfig(),
        search=replace(base.search, searcher="sampler", num_trials=50),
    )


def focusformer_tour() -> Run:
    """The same in miniature: handwritten digits, minutes on two CPU cores."""
    base = on_digits()
    return replace(
        base,
        recipe="focusformer_tour",
        sampler=FocusConfig(),
        search=SearchConfig(searcher="sampler", num_trials=6),
    )
