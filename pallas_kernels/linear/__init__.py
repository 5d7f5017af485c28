"""Linear attention: recurrences whose state is a matrix, in forms for training and decoding."""

from pallas_kernels.linear.api import linear_attention
from pallas_kernels.linear.options import NormalizedState
from pallas_kernels.linear.sharded import sharded_linear_attention

__all__ = ["NormalizedState", "linear_attention", "sharded_linear_attention"]
