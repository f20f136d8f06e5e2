"""What an encoder has learned: features, kNN and linear probes, signs of collapse, pictures."""

from fastjepa.evaluation.collapse import (
    CollapseSigns,
    between_image_std,
    collapse_warning,
    prediction_std,
    rankme,
    token_std,
)
from fastjepa.evaluation.features import pixel_features, pool_features, standardise
from fastjepa.evaluation.knn import knn_accuracy, knn_correct
from fastjepa.evaluation.linear import LinearProbe, fit_linear, linear_accuracy
from fastjepa.evaluation.pictures import patch_pca

__all__ = [
    "CollapseSigns",
    "LinearProbe",
    "between_image_std",
    "collapse_warning",
    "fit_linear",
    "knn_accuracy",
    "knn_correct",
    "linear_accuracy",
    "patch_pca",
    "pixel_features",
    "pool_features",
    "prediction_std",
    "rankme",
    "standardise",
    "token_std",
]
