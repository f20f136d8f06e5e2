"""What a step of I-JEPA would take, in time and in memory, on 8 to 4,096 GPUs: arithmetic, not measurement.

    python -m bench.scale_model           # or: make scale-model

It stands on what was measured on one GPU (bench/results), on the sizes of the messages and the tensors, and
on rates of the links that are given on the command line. Nothing of it was run on more than one GPU.
"""
