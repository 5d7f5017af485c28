"""Linear attention: recurrences whose state is a matrix, in forms for training and decoding."""

from pallas_kernels.linear.api import linear_attention
from pallas_kernels.linear.options import NormalizedState

__all__ = ["NormalizedState", "linear_attention"]
