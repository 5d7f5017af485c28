"""What every mixer of a forward pass is told about positions and visibility."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.block_cache import View
from pallas_kernels.masks import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Shared by all layers of one forward pass.

    Attributes:
      positions: int32 `[B, T]`, each token's place in its document (and in the cache).
      rope: cosines and sines of the rotary embedding, float32 `[B, T, h/2]` each, for each head
        dimension h that a mixer rotates.
      key_rope: those of attention's keys, where they differ.
      mask: who may see whom; None where no layer attends to all positions.
      window_mask: and within a window; None where no layer has one, or given a cache.
      segment_ids: int32 `[B, T]`, documents count from 1, 0 is padding; None: one document a row.
      view: of a cache in blocks, what is seen of it and where the tokens go; None: there is none.
      branches: int32 `[B, T]`, the number of each token's branch, 0 outside of branches; None: all.
      soft: how many soft tokens stand before the T tokens of every row. Positions, rope and masks
        are of both; every document sees the soft tokens, which segment ids do not say.
    """

    positions: Int[Array, "B T"]
    rope: Mapping[int, tuple[Float[Array, "B T half"], Float[Array, "B T half"]]]
    mask: Mask | None = None
    window_mask: Mask | None = None
    segment_ids: Int[Array, "B T"] | None = None
    branches: Int[Array, "B T"] | None = None
    view: View | None = None
    key_rope: tuple[Float[Array, "B T half"], Float[Array, "B T half"]] | None = None
    soft: int = dataclasses.field(default=0, metadata={"static": True})

    def real_tokens(self) -> Int[Array, "B"]:
        """How many tokens of each row are no padding."""
        if self.segment_ids is None:
            return jnp.full(self.positions.shape[:1], self.positions.shape[1], jnp.int32)
        return jnp.sum(self.segment_ids != 0, 1, dtype=jnp.int32)

    def document_starts(self) -> Int[Array, "B T"] | None:
        """Where the run of equal segment ids around each token begins; None: all at 0."""
        if self.segment_ids is None:
            return None
        index = jnp.broadcast_to(jnp.arange(self.segment_ids.shape[1]), self.segment_ids.shape)
        begins = self.segment_ids[:, 1:] != self.segment_ids[:, :-1]
        begins = jnp.pad(begins, ((0, 0), (1, 0)))
        return jax.lax.cummax(jnp.where(begins, index, 0), axis=1)

    def split(self) -> tuple["Context", "Context"]:
        """For a recurrence: the soft tokens alone, and the tokens after them."""

        def part(places: slice, segment_ids) -> Context:
            positions, rope = jax.tree.map(lambda x: x[:, places], (self.positions, self.rope))
            return Context(positions, rope, segment_ids=segment_ids)

        return part(slice(self.soft), None), part(slice(self.soft, None), self.segment_ids)
