"""Accuracy: against time and FLOPs, and against detail that nobody can predict."""
