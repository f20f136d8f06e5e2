"""The machinery of a run: DeepSpeed, the target encoder under ZeRO, schedules, checkpoints, judgement."""

import os

import torch

# DeepSpeed chooses its accelerator when it is imported, and where it finds none complains in every process.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
