"""What every mixer of a forward pass is told about positions and visibility."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.linear.api import count_documents
from pallas_kernels.masks import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Shared by all layers of one forward pass.

    Attributes:
      positions: int32 `[B, T]`, each token's place in its document (and in the cache).
      rope: cosines and sines of the rotary embedding, float32 `[B, T, h/2]` each, for each head
        dimension h that a mixer rotates.
      mask: who may see whom; None where no layer attends to all positions.
      window_mask: and within a window; None where no layer has one, or given a cache.
      segment_ids: int32 `[B, T]`, documents count from 1, 0 is padding; None: one document a row.
    """

    positions: Int[Array, "B T"]
    rope: Mapping[int, tuple[Float[Array, "B T half"], Float[Array, "B T half"]]]
    mask: Mask | None = None
    window_mask: Mask | None = None
    segment_ids: Int[Array, "B T"] | None = None

    def real_tokens(self) -> Int[Array, "B"]:
        """How many tokens of each row are no padding."""
        if self.segment_ids is None:
            return jnp.full(self.positions.shape[:1], self.positions.shape[1], jnp.int32)
        return jnp.sum(self.segment_ids != 0, 1, dtype=jnp.int32)

    def documents(self) -> Int[Array, "B T"] | None:
        """A number for the document of each token, -1 for padding; None: one document a row."""
        if self.segment_ids is None:
            return None
        return jnp.where(self.segment_ids == 0, -1, count_documents(self.segment_ids))
