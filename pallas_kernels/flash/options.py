"""What every implementation of attention is told besides its arrays."""

from typing import NamedTuple


class Options(NamedTuple):
    """Known when tracing.

    Attributes:
      scale: of the scores.
      soft_cap: c, to replace each scaled score s by c tanh(s / c); None: not.
    """

    scale: float
    soft_cap: float | None
