"""The forms in which P may enter the scaling law, and a law with all its parameters.

L = (A / (N m(P)))^alpha + E: P streams are worth as much as m(P) times the parameters. In the
ParScale paper (arXiv 2505.10475, equation 5) m(P) = k ln P + 1; its rivals differ in m alone.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from sharding.settings import InputError

# A multiplier below this would mean that streams throw away nearly all of a model; the floor keeps
# its logarithm finite while a line search tries far steps.
FLOOR = 1e-2

LogMultiplier = Callable[[np.ndarray, np.ndarray, float], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Form:
    """One way in which P may enter the law.

    Attributes:
      name: what it is called.
      formula: of m(P), as text.
      shape: names of its own parameters, q of them.
      log_multiplier: from P [n], the shape parameters [q] and alpha to ln m [n], its derivatives by
        the shape parameters [n, q], and by ln alpha [n].
      starts: values of the shape parameters from which a fit sets out.
    """

    name: str
    formula: str
    shape: tuple[str, ...]
    log_multiplier: LogMultiplier
    starts: tuple[tuple[float, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters: E, A, alpha, then those of the shape."""
        return ("E", "A", "alpha", *self.shape)


def _one_plus(feature: Callable[[np.ndarray], np.ndarray]) -> LogMultiplier:
    def log_multiplier(streams, shape, alpha):
        x = feature(streams)
        m = 1 + shape[0] * x
        inside = np.where(m > FLOOR, x, 0.0)
        m = np.maximum(m, FLOOR)
        return np.log(m), (inside / m)[:, None], np.zeros(len(x))

    return log_multiplier


def _power(streams, shape, alpha):
    x = np.log(streams)
    return shape[0] * x, x[:, None], np.zeros(len(x))


def _correlation(streams, shape, alpha):
    # The paper's proposition 1: (A / N)^alpha shrinks by ((P - 1) rho + 1) / P.
    share = ((streams - 1) * shape[0] + 1) / streams
    slope = np.where(share > FLOOR, (streams - 1) / streams, 0.0)
    share = np.maximum(share, FLOOR)
    log_m = -np.log(share) / alpha
    return log_m, (-slope / share / alpha)[:, None], -log_m


def _none(streams, shape, alpha):
    zero = np.zeros(len(streams))
    return zero, np.zeros((len(streams), 0)), zero


LOG = Form("logarithm", "k ln P + 1", ("k",), _one_plus(np.log), ((0.1,), (1.0,)))
POWER = Form("power", "P^beta", ("beta",), _power, ((0.1,), (0.5,)))
CORRELATION = Form(
    "constant correlation", "(P / ((P - 1) rho + 1))^(1/alpha)", ("rho",), _correlation,
    ((0.5,), (0.95,)),
)  # fmt: skip
SATURATING = Form(
    "saturating", "k (1 - 1/P) + 1", ("k",), _one_plus(lambda streams: 1 - 1 / streams),
    ((0.1,), (1.0,)),
)  # fmt: skip
NONE = Form("no P", "1", (), _none, ((),))
RIVALS = (LOG, POWER, CORRELATION, SATURATING, NONE)


def free_form(streams: np.ndarray) -> Form:
    """A multiplier of its own for each P above 1 in `streams`, and 1 for P = 1.

    Its shape parameters are logarithms of the multipliers. It says nothing of a P that is not
    there: NaN.
    """
    known = sorted(set(map(int, streams)) - {1})

    def log_multiplier(streams, shape, alpha):
        which = np.equal.outer(streams, known).astype(float)
        unknown = (streams != 1) & ~which.any(-1)
        return np.where(unknown, np.nan, which @ shape), which, np.zeros(len(which))

    names = tuple(f"ln m({p})" for p in known)
    return Form("free", "one for each P", names, log_multiplier, ((0.1,) * len(known),))


@dataclasses.dataclass(frozen=True)
class Law:
    """L = (A / (N m(P)))^alpha + E with all its parameters; `shape` holds those of m.

    N is the number of parameters without embeddings, prefixes and aggregation included; L is in
    nats per token.
    """

    E: float
    A: float
    alpha: float
    shape: tuple[float, ...] = ()
    form: Form = LOG

    @property
    def values(self) -> tuple[float, ...]:
        """All parameters, in the order of `form.names`."""
        return (self.E, self.A, self.alpha, *self.shape)

    def multiplier(self, streams) -> np.ndarray:
        """m(P), of the shape of `streams`."""
        streams = np.asarray(streams, np.float64)
        shape = np.asarray(self.shape, np.float64)
        return np.exp(self.form.log_multiplier(streams.ravel(), shape, self.alpha)[0]).reshape(
            streams.shape
        )

    def loss(self, params, streams) -> np.ndarray:
        """L at N and P, which broadcast against each other."""
        return self.E + (self.A / self.equal_params(params, streams)) ** self.alpha

    def equal_params(self, params, streams) -> np.ndarray:
        """The N with which P = 1 reaches the loss of N with P streams: N m(P)."""
        return np.asarray(params, np.float64) * self.multiplier(streams)

    def params_for(self, loss: float, streams) -> np.ndarray:
        """The N with which P streams reach a loss.

        Raises:
          InputError: the loss is not above E, which no size reaches.
        """
        if not loss > self.E:
            raise InputError(
                f"loss {loss}: no size reaches it; expected more than the law's E = {self.E:.6g}"
            )
        return self.A * (loss - self.E) ** (-1 / self.alpha) / self.multiplier(streams)
