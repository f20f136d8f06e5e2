"""What fastjepa's throughput is compared with: MAE and I-JEPA as published, and both in today's torch."""

from bench.reference.ijepa import IJEPATrainer, ReferenceIJEPA
from bench.reference.mae import MAETrainer, ReferenceMAE
from bench.reference.vit import Precision

__all__ = ["IJEPATrainer", "MAETrainer", "Precision", "ReferenceIJEPA", "ReferenceMAE"]
