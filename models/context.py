"""What every mixer of a forward pass is told about positions and visibility."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.masks import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Shared by all layers of one forward pass.

    Attributes:
      positions: int32 `[B, T]`, each token's place in its document (and in the cache).
      rope: cosines and sines of the rotary embedding, float32 `[B, T, h/2]` each.
      mask: who may see whom.
      segment_ids: int32 `[B, T]`, documents count from 1, 0 is padding; None: one document a row.
    """

    positions: Int[Array, "B T"]
    rope: tuple[Float[Array, "B T half"], Float[Array, "B T half"]]
    mask: Mask
    segment_ids: Int[Array, "B T"] | None = None
