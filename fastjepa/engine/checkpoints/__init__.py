"""Checkpoints: what they are, how they come to the disk, and how a run goes on from one."""
