"""Block-sparse softmax attention."""

from pallas_kernels.flash.api import attention
from pallas_kernels.flash.sharded import sharded_attention

__all__ = ["attention", "sharded_attention"]
