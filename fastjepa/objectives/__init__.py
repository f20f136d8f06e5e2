"""What is learned: JEPA, and MAE as the reference."""

from fastjepa.objectives.jepa import JEPA, Student
from fastjepa.objectives.mae import MAE
from fastjepa.objectives.step import Step

__all__ = ["JEPA", "MAE", "Step", "Student"]
