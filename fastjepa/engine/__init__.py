"""The machinery of a run: DeepSpeed, the target encoder under ZeRO, schedules, checkpoints, judgement."""
