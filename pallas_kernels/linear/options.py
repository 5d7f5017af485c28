"""What an implementation of linear attention is given, and the states that it carries."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class Options(NamedTuple):
    """Known when tracing.

    Attributes:
      scale: of the queries.
      normalize: outputs are divided as in the mLSTM; states are then whole `NormalizedState`s.
      chunk: positions that are computed at once.
    """

    scale: float
    normalize: bool
    chunk: int


class NormalizedState(NamedTuple):
    """The state of a normalized recurrence, float32; the batch axes may be missing.

    Attributes:
      matrix: sum of k v^T, in units of exp(maximum).
      normalizer: sum of k, in the same units.
      maximum: running maximum m of the exponents. Gradients take it for a constant, since what is
        computed from the three does not depend on it.
    """

    matrix: Float[Array, "*lead H hk hv"]
    normalizer: Float[Array, "*lead H hk"] | None
    maximum: Float[Array, "*lead H"] | None


class Inputs(NamedTuple):
    """The arrays, with folded axes. Padding has q, k, v, beta and log_decay 0, input_gate LOWEST.

    Attributes:
      q, k: `[N, P, T, K, hk]`.
      v: `[N, P, T, H, hv]`, value head j beside key head j // (H // K).
      log_decay: float32 `[N, P, T, H]` or `[N, P, T, H, hk]`, at least LOWEST; None: no decay.
      beta: float32 `[N, P, T, H]`, of the delta rule; None: there is none.
      input_gate: float32 `[N, P, T, H]`, a logarithm; None: the gate is open.
      documents: int32 `[N, P or 1, T]`, how many documents of the row began before that of each
        token; None: all tokens are of document 0.
      initial: what document 0 starts from, with axes `[N or 1, P, ...]`; normalizer and maximum
        are None unless normalized. None: zero.
      restart: what other documents start from, with axes `[P, ...]`. None: zero.
    """

    q: Float[Array, "N P T K hk"]
    k: Float[Array, "N P T K hk"]
    v: Float[Array, "N P T H hv"]
    log_decay: Float[Array, "N P T H"] | Float[Array, "N P T H hk"] | None
    beta: Float[Array, "N P T H"] | None
    input_gate: Float[Array, "N P T H"] | None
    documents: Int[Array, "N P T"] | None
    initial: NormalizedState | None
    restart: NormalizedState | None


LOWEST = -64.0
"""Logarithm of a factor that is as good as 0 in float32, and of which a chunk's sum is exact."""
