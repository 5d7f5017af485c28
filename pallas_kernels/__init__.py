"""Ops with one public function each and several implementations; knows nothing of models."""

from pallas_kernels.flash import attention, sharded_attention

__all__ = ["attention", "sharded_attention"]
