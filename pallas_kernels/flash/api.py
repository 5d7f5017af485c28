"""The public attention op: checks its arguments and chooses the implementation."""

from jaxtyping import Array, Float

from pallas_kernels.flash import oracle, xla
from pallas_kernels.masks import Mask

IMPLEMENTATIONS = {"xla": xla.attention, "oracle": oracle.attention}


def attention(
    q: Float[Array, "*lead T H h"],
    k: Float[Array, "*lead S K h"],
    v: Float[Array, "*lead S K h"],
    mask: Mask,
    *,
    prefix: tuple[Float[Array, "P K M h"], Float[Array, "P K M h"]] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "*lead T H h"] | tuple[Float[Array, "*lead T H h"], Float[Array, "*lead T H"]]:
    """Grouped-query softmax attention; query head j reads key/value head j // (H // K).

    Scores, softmax and accumulation are float32. A query that sees nothing has output zero,
    log-sum-exp -inf, and gives no gradient.

    Args:
      q: queries; any leading axes, usually B, P.
      k, v: keys and values, with the leading axes of q.
      mask: which keys each query sees (`pallas_kernels.masks`).
      prefix: keys and values of M slots that every query sees, for each entry of the last leading
        axis P; read by index, never broadcast over the other leading axes.
      scale: of the scores; h ** -0.5 by default.
      soft_cap: c, to replace each score s by c tanh(s / c).
      return_lse: also return the log-sum-exp of each query's scores.
      implementation: "xla" (the tiled form, also the default) or "oracle".

    Returns:
      the output in q's dtype; with `return_lse` a pair of it and float32 `[..., T, H]`.

    Raises:
      ValueError: an unknown implementation, or shapes that do not fit together.
    """
    _check(q, k, v, mask, prefix)
    name = "xla" if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation={name!r}: attention has these implementations: {known}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out, lse = IMPLEMENTATIONS[name](q, k, v, mask, prefix, scale, soft_cap)
    return (out, lse) if return_lse else out


def _check(q, k, v, mask, prefix):
    """Raises ValueError, with the shapes, for arguments that do not fit together."""
    lead, (T, H, h) = q.shape[:-3], q.shape[-3:]
    S, K = k.shape[-3:-1]
    if k.shape != v.shape or k.shape != (*lead, S, K, h):
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape}: expected q [..., T, H, h] and "
            "k, v [..., S, K, h] with equal leading axes and head dimension"
        )
    if H % K:
        raise ValueError(f"{H} query heads: expected a multiple of the {K} key/value heads")
    if mask.causal and S != T:
        raise ValueError(f"a causal mask of {T} queries and {S} keys: expected as many of both")
    if mask.intervals is not None:
        *axes, _, pair, keys = mask.intervals.shape
        fits = all(n in (1, size) for n, size in zip(axes, lead, strict=False))
        if pair != 2 or keys != S or len(axes) > len(lead) or not fits:
            raise ValueError(
                f"mask intervals {mask.intervals.shape}: expected [..., R, 2, {S}] with leading "
                f"axes that broadcast, from the left, to {lead}"
            )
    if prefix is not None:
        shapes = [part.shape for part in prefix]
        expected = (*lead[-1:], K, shapes[0][-2], h)
        if not lead or shapes != [expected, expected]:
            raise ValueError(
                f"prefix of shapes {shapes} for q {q.shape}: expected two of [P, K, M, h], "
                f"P the last leading axis of q, with K={K} and h={h}"
            )
