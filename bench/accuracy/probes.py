"""How features are judged: as the engine's judge does it, in a process beside the one that trains."""

from typing import Any

import numpy as np
import torch

from fastjepa.evaluation import knn_accuracy, linear_accuracy, standardise

NEIGHBOURS = 20
Array = np.ndarray[Any, Any]


def prepare_process() -> None:
    """Each takes one core: there are as many as there are cores to give."""
    torch.set_num_threads(1)


def judge(
    bank: Array, bank_labels: Array, queries: Array, query_labels: Array, seed: int
) -> dict[str, float | None]:
    """kNN and linear accuracy of features [n, D] and [m, D], both on standardised ones.

    None in place of a number where a feature is not finite: the run has diverged.
    """
    if not (np.isfinite(bank).all() and np.isfinite(queries).all()):
        return {"knn_top1": None, "linear_top1": None}
    train, train_labels, test, test_labels = map(torch.from_numpy, (bank, bank_labels, queries, query_labels))
    near, asked = standardise(train, test)
    return {
        "knn_top1": knn_accuracy(near, train_labels, asked, test_labels, k=min(NEIGHBOURS, len(near))),
        "linear_top1": linear_accuracy(train, train_labels, test, test_labels, seed=seed).accuracy,
    }
