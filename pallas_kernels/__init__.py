"""Ops with one public function each and several implementations; knows nothing of models."""

from pallas_kernels.flash import attention, sharded_attention
from pallas_kernels.linear import NormalizedState, linear_attention, sharded_linear_attention

__all__ = [
    "NormalizedState",
    "attention",
    "linear_attention",
    "sharded_attention",
    "sharded_linear_attention",
]
