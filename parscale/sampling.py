"""How the next token is chosen: settings of a request, and the choice for rows of any of them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sharding.settings import InputError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only this many most likely tokens are candidates; 0 for all.
      top_p: only the fewest tokens whose probabilities reach this sum are candidates.
      seed: of the random choices, from 0 to 2**32 - 1.
      index: of the row among those with this seed; each makes choices of its own.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    index: int = 0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise InputError(f"temperature={self.temperature}: expected 0 (greedy) or more")
        if not 0 <= self.top_k < 2**31:
            raise InputError(f"top_k={self.top_k}: expected 0 (all tokens) to 2**31 - 1")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: expected more than 0, at most 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed}: expected a number from 0 to 2**32 - 1")
        if not 0 <= self.index < 2**32:
            raise InputError(f"index={self.index}: expected a number from 0 to 2**32 - 1")


GREEDY = Sampling(temperature=0.0)


class Choice(NamedTuple):
    """Settings of rows as arrays.

    Attributes:
      temperature, top_p: float32 `[B]`.
      top_k: int32 `[B]`.
      seeds: uint32 `[B, 3]`: the seed, the index of the row, the number of its branch.
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    seeds: Int[Array, "B 3"]


def as_arrays(rows: list[tuple[Sampling, int]], size: int) -> tuple[Choice, str]:
    """Settings and branch numbers of rows, filled up to `size`, and what `choose` has to do."""
    rest = [(GREEDY, 0)] * (size - len(rows))
    settings = [sampling for sampling, _ in (*rows, *rest)]
    method = "greedy" if all(sampling.temperature == 0 for sampling in settings) else "random"
    return Choice(
        np.array([sampling.temperature for sampling in settings], np.float32),
        np.array([sampling.top_k for sampling in settings], np.int32),
        np.array([sampling.top_p for sampling in settings], np.float32),
        np.array([(s.seed, s.index, branch) for s, branch in (*rows, *rest)], np.uint32),
    ), method


def choose(
    logits: Float[Array, "B V"], choice: Choice, positions: Int[Array, "B"], method: str
) -> Int[Array, "B"]:
    """A token for each row.

    The key of a random choice is the row's seeds and the token's position, and nothing of others.

    Args:
      logits: float32.
      choice: settings of each row.
      positions: where the token will stand.
      method: "greedy" where every row is, else "random".
    """
    best = jnp.argmax(logits, -1).astype(jnp.int32)
    if method == "greedy":
        return best
    warm = choice.temperature > 0
    # The best is 0 first: divided by a small temperature, others would overflow beside it.
    logits = logits - jnp.max(logits, -1, keepdims=True)
    logits = logits / jnp.where(warm, choice.temperature, 1.0)[:, None]
    # Sorting is left out where no row asks for it, without compiling for each of the two cases.
    filtered = jnp.any((choice.top_k > 0) | (choice.top_p < 1))
    keep = lambda logits: keep_candidates(logits, choice.top_k, choice.top_p)
    logits = jax.lax.cond(filtered, keep, lambda logits: logits, logits)

    def draw(seeds, position, logits):
        key = jax.random.key(seeds[0])
        for part in (seeds[1], seeds[2], position):
            key = jax.random.fold_in(key, part)
        return jax.random.categorical(key, logits)

    drawn = jax.vmap(draw)(choice.seeds, positions, logits).astype(jnp.int32)
    return jnp.where(warm, drawn, best)


def keep_candidates(
    logits: Float[Array, "B V"], top_k: Int[Array, "B"], top_p: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """`logits` with -inf where a token is outside its row's `top_k`, then outside its `top_p`."""
    size = logits.shape[-1]
    ordered = jnp.sort(logits, -1, descending=True)
    count = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)[:, None]
    least = jnp.take_along_axis(ordered, count - 1, 1)
    ordered = jnp.where(ordered < least, -jnp.inf, ordered)
    shares = jax.nn.softmax(ordered, -1)
    before = jnp.cumsum(shares, -1) - shares
    # The sum of all shares may pass 1 by rounding; a top_p of 1 keeps everything.
    kept = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    least_of_p = jnp.min(jnp.where(kept, ordered, jnp.inf), -1, keepdims=True)
    return jnp.where(logits < jnp.maximum(least, least_of_p), -jnp.inf, logits)
