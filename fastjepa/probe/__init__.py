"""The published protocols on a trained encoder: what `fastjepa probe` does, and how results are compared."""

KNN, LINEAR, ATTENTIVE, LOW_SHOT, COLLAPSE = "knn", "linear", "attentive", "low-shot", "collapse"
PROTOCOLS = (KNN, LINEAR, ATTENTIVE, LOW_SHOT, COLLAPSE)
ENCODERS = ("target", "context")
