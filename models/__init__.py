"""Parallel-scaling language models as Flax NNX modules."""
