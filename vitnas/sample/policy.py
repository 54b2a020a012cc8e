"""Policy: a distribution over the Archs of a Space that depends on what an Arch may cost.

Source: FocusFormer (arXiv 2208.10861) describes a sampler that is asked for a resource constraint and learned together
with the Supernet; the network here follows the controller of PNAG, which it builds on: an LSTM makes one decision
after the other, classifiers and embeddings are shared by the decisions of a kind. What is ours is listed in PAPERS.md.

Shapes: N draws, G genes, H hidden, K anchors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vitnas.space import Gene, Matrix, Space, kind_of

HIDDEN = 64


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a Policy drew.

    Attributes:
        genes_NG: canonical genes.
        log_prob_N: of the decisions that matter, together.
        entropy_NG: of each decision; 0 where it does not matter.
    """

    genes_NG: Matrix
    log_prob_N: Tensor
    entropy_NG: Tensor


class Policy(nn.Module):
    """p(genes | budget), gene after gene in the Space's order.

    A budget is turned into a vector by linear interpolation between those of its neighbouring anchors, so every budget
    between the first anchor and the last is known. A gene that does not matter given the genes before it is no
    decision: it takes option 0 and has neither log-probability nor entropy, so that equal Archs have equal probability.

    Args:
        space: whose genes are decided.
        anchors: rising budgets that have a vector of their own.
        hidden: width of everything.
        generator: source of the initial weights, uniform in +-0.1 (PNAG's rule).
    """

    def __init__(
        self,
        space: Space,
        anchors: Sequence[float],
        *,
        hidden: int = HIDDEN,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.space = space
        self.anchors = tuple(float(anchor) for anchor in anchors)
        keys = [decision(gene) for gene in space.genes]
        options = {key: len(gene.options) for key, gene in zip(keys, space.genes, strict=True)}
        self._keys = keys
        self.budget = nn.Parameter(torch.empty(len(self.anchors), hidden))
        self.cell = nn.LSTMCell(hidden, hidden)
        self.heads = nn.ModuleDict({key: nn.Linear(hidden, n) for key, n in options.items()})
        self.chosen = nn.ModuleDict({key: nn.Embedding(n, hidden) for key, n in options.items()})
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1, generator=generator)

    def forward(
        self,
        budgets_N: Tensor,
        *,
        generator: torch.Generator | None = None,
        greedy: bool = False,
        given_NG: Matrix | None = None,
    ) -> Drawn:
        """Draw one Arch per budget; with `greedy` take the likeliest option of each decision in turn; with `given_NG`
        (canonical genes) draw nothing and say how probable these are."""
        budget_NH = self.embed(budgets_N)
        hidden_NH = cell_NH = torch.zeros_like(budget_NH)
        chosen_NH = torch.zeros_like(budget_NH)
        genes_NG = np.zeros((len(budgets_N), len(self._keys)), dtype=np.int64)
        log_prob_N = budgets_N.new_zeros(len(budgets_N))
        entropies = []
        for place, key in enumerate(self._keys):
            hidden_NH, cell_NH = self.cell(chosen_NH + budget_NH, (hidden_NH, cell_NH))
            log_probs_NO = self.heads[key](hidden_NH).log_softmax(1)
            probs_NO = log_probs_NO.exp()
            matters_N = torch.from_numpy(self.space.active_matrix(genes_NG)[:, place].copy())
            with torch.no_grad():
                if given_NG is not None:
                    option_N = torch.from_numpy(given_NG[:, place].copy())
                elif greedy:
                    option_N = probs_NO.argmax(1) * matters_N
                else:
                    option_N = torch.multinomial(probs_NO, 1, generator=generator)[:, 0] * matters_N
            genes_NG[:, place] = option_N.numpy()
            log_prob_N = log_prob_N + log_probs_NO.gather(1, option_N[:, None])[:, 0] * matters_N
            entropies.append(-(probs_NO * log_probs_NO).sum(1) * matters_N)
            chosen_NH = self.chosen[key](option_N)
        # A Space may have more to its canonical form than genes that do not matter (patches kept never rise).
        return Drawn(self.space.canonical_matrix(genes_NG), log_prob_N, torch.stack(entropies, dim=1))

    def embed(self, budgets_N: Tensor) -> Tensor:
        """(N,) budgets to (N, H) vectors; budgets beyond the anchors count as the outermost."""
        anchors_K = torch.tensor(self.anchors, dtype=torch.float64)
        at_N = budgets_N.double().clamp(self.anchors[0], self.anchors[-1])
        right_N = torch.searchsorted(anchors_K, at_N).clamp(1, len(self.anchors) - 1)
        left, right = anchors_K[right_N - 1], anchors_K[right_N]
        share_N1 = ((at_N - left) / (right - left)).to(self.budget.dtype)[:, None]
        return self.budget[right_N - 1] * (1 - share_N1) + self.budget[right_N] * share_N1


def decision(gene: Gene) -> str:
    """Genes of one kind with equally many options share a classifier: `num_heads_3` of gene `num_heads.0`."""
    return f"{kind_of(gene)}_{len(gene.options)}"
