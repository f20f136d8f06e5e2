"""The published protocols on a trained encoder: what `fastjepa probe` does, and how results are compared."""
