"""Ahead-of-time proof of the Triton kernels: compiled for GPUs that are not there, binaries read.

`python -m bench.aot`, or `make aot`, compiles every launch that the ops make for the sizes of `cases`,
and gates what the compilers made of it on a committed table, one for each version of Triton.
"""
