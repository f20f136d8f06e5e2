"""Images per second of whole training steps: fastjepa against published and modernised MAE and I-JEPA."""
