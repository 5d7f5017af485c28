"""Softmax attention."""

from pallas_kernels.flash.api import attention

__all__ = ["attention"]
