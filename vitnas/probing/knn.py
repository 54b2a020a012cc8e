"""Weighted nearest neighbours (Wu et al. 2018, section 3.4), as DINO and EsViT evaluate features.

Legend: N images of the bank, Q images that are asked for, D features, K neighbours, Y classes.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

ROWS = 1024  # queries at a time


def knn_votes(
    bank_ND: Tensor, classes_N: Tensor, asked_QD: Tensor, *, k: int, temperature: float, num_classes: int
) -> Tensor:
    """(Q, Y) votes: each of the `k` nearest by cosine (all, where there are fewer) gives exp(cosine / temperature) to
    its class. Nothing is left to chance: the same features give the same votes.

    Args:
        bank_ND, asked_QD: features, of any length.
        classes_N: class numbers of the bank.
    """
    k = min(k, len(bank_ND))
    bank_DN = functional.normalize(bank_ND, dim=1).T
    votes_QY = asked_QD.new_zeros(len(asked_QD), num_classes)
    for start in range(0, len(asked_QD), ROWS):
        part_QD = functional.normalize(asked_QD[start : start + ROWS], dim=1)
        nearest_QK, places_QK = (part_QD @ bank_DN).topk(k, dim=1)
        # Less the largest, so that no temperature is too low; each image's votes are compared with each other alone.
        weights_QK = ((nearest_QK - nearest_QK[:, :1]) / temperature).exp()
        votes_QY[start : start + ROWS].scatter_add_(1, classes_N[places_QK], weights_QK)
    return votes_QY


def knn_accuracy(
    bank_ND: Tensor,
    classes_N: Tensor,
    asked_QD: Tensor,
    classes_Q: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of the images asked for whose class gets the most votes (see `knn_votes`)."""
    most = int(max(classes_N.max(), classes_Q.max())) + 1
    votes_QY = knn_votes(bank_ND, classes_N, asked_QD, k=k, temperature=temperature, num_classes=most)
    return float((votes_QY.argmax(1) == classes_Q).double().mean())
