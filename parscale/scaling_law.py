"""Fitting the parallel scaling law and its rivals to runs, and how sure the fit is.

The objective is the paper's (arXiv 2505.10475): the sum of Huber losses of the residuals in the
logarithm of the loss. Everything is float64.
"""

import contextlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import threadpoolctl
from scipy import optimize, special

from parscale.law_forms import LOG, Form, Law
from parscale.law_points import Points, sizes
from sharding.settings import InputError

DELTA = 1e-3  # where the Huber loss of a residual in log loss turns from square to linear
LEAST_SIZES, LEAST_STREAMS, LEAST_POINTS = 3, 2, 6
ZERO = 1e-6  # below this E, A and alpha, which are fitted as logarithms, count as 0


class Fit(NamedTuple):
    """A fitted law, its Huber sum and R2 (of losses, not of their logarithms)."""

    law: Law
    objective: float
    r2: float


class LeftOut(NamedTuple):
    """The law fitted without one P or one size, and how it predicts what was left out.

    Attributes:
      value: the P, or the N of the size at the fewest streams.
      law: None where the rest does not identify it; `errors` is then empty.
      errors: predicted less observed loss of each run left out.
    """

    value: float
    law: Law | None
    errors: np.ndarray


def check_identifiable(points: Points) -> None:
    """Raises InputError, saying what is missing, unless the points can tell four parameters.

    They must be of 6 different pairs of N and P or more, with 3 different N at one P, and 2 P.
    """
    pairs = set(zip(points.params, points.streams, strict=True))
    streams = sorted({int(p) for _, p in pairs})
    most = max(sum(p == q for _, q in pairs) for p in streams)
    missing = []
    if len(pairs) < LEAST_POINTS:
        missing.append(f"{LEAST_POINTS} different pairs of params and streams")
    if most < LEAST_SIZES:
        missing.append(f"{LEAST_SIZES} different params at one number of streams")
    if len(streams) < LEAST_STREAMS:
        missing.append(f"{LEAST_STREAMS} different numbers of streams")
    if missing:
        raise InputError(
            f"too few points to identify E, A, alpha and k: expected at least "
            f"{' and '.join(missing)}; found {len(points)} point{'s' * (len(points) != 1)} with "
            f"{len(pairs)} different pairs, {most} params at one number of streams, "
            f"streams {', '.join(map(str, streams))}"
        )


def objective(law: Law, points: Points) -> float:
    """Sum over the points of the Huber loss (delta 1e-3) of predicted less observed ln L."""
    value, _ = _huber(np.log(law.loss(points.params, points.streams)) - np.log(points.loss))
    return float(value.sum())


def r2(law: Law, points: Points) -> float:
    """Share of the variance of the losses that the law explains."""
    error = law.loss(points.params, points.streams) - points.loss
    return float(1 - np.square(error).sum() / np.square(points.loss - points.loss.mean()).sum())


def _huber(residual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Huber loss of each residual, and its derivative."""
    size = np.abs(residual)
    value = np.where(size <= DELTA, 0.5 * residual**2, DELTA * (size - 0.5 * DELTA))
    return value, np.minimum(np.maximum(residual, -DELTA), DELTA)  # np.clip takes twice as long


def log_loss(form: Form, z: np.ndarray, points: Points) -> tuple[np.ndarray, np.ndarray]:
    """Predicted ln L at the points [n] and its Jacobian [n, 3 + q].

    Args:
      form: how P enters.
      z: [3 + q] ln E, ln A, ln alpha, then the shape parameters as they are.
      points: where; their losses are not used.
    """
    # The clip only keeps far steps of a line search finite.
    alpha = np.exp(min(max(z[2], -30.0), 5.0))
    log_m, by_shape, by_alpha = form.log_multiplier(points.streams, z[3:], alpha)
    x = z[1] - np.log(points.params) - log_m
    value = np.logaddexp(z[0], alpha * x)
    share = np.exp(alpha * x - value) * alpha  # of the reducible loss in L, times alpha
    by_e = np.exp(z[0] - value)
    columns = (by_e, share, share * (x - by_alpha))
    return value, np.concatenate([np.stack(columns, -1), -share[:, None] * by_shape], -1)


def _descend(form: Form, points: Points, target: np.ndarray, z: np.ndarray, tolerance=1e-13):
    """L-BFGS from z towards the observed ln L [n]. Returns where it ends and the Huber sum there.

    The law's parameters trade off strongly against each other, so it walks in coordinates in which
    the sum of squares is round at the start: a few steps instead of a hundred.
    """
    scale = DELTA**-2  # the optimizer's tolerances are meant for sums of about 1
    jacobian = log_loss(form, z, points)[1]
    ridge = 1e-6 * np.linalg.norm(jacobian) * np.eye(len(z))
    back = np.linalg.inv(np.linalg.qr(np.concatenate([jacobian, ridge]))[1]) * DELTA

    def step(u):
        predicted, jacobian = log_loss(form, z + back @ u, points)
        value, slope = _huber(predicted - target)
        return value.sum() * scale, (slope * scale) @ jacobian @ back

    options = {"maxiter": 1000, "ftol": tolerance, "gtol": 1e-7}
    found = optimize.minimize(step, np.zeros_like(z), jac=True, method="L-BFGS-B", options=options)
    return z + back @ found.x, found.fun / scale


def _one_thread() -> contextlib.AbstractContextManager:
    """Inside, linear algebra runs on one thread.

    L-BFGS-B factors matrices of a few rows; on two threads of OpenBLAS that took up to 70 times as
    long, as they wait for each other.
    """
    return threadpoolctl.threadpool_limits(1, "blas")


def _starts(form: Form, points: Points) -> list[np.ndarray]:
    """A grid of E and alpha and the form's own starts; A so that the mean loss is right."""
    result = []
    for share, alpha, shape in itertools.product((0.3, 0.6, 0.9), (0.1, 0.4), form.starts):
        e = share * points.loss.min()
        log_m = form.log_multiplier(points.streams, np.array(shape), alpha)[0]
        log_a = np.mean(np.log(points.params) + log_m + np.log(points.loss - e) / alpha)
        result.append(np.array([np.log(e), log_a, np.log(alpha), *shape]))
    return result


def _law(form: Form, z: np.ndarray) -> Law:
    e, a, alpha = np.exp(np.clip(z[:3], -700, 700)).tolist()
    return Law(e, a, alpha, tuple(z[3:].tolist()), form)


def _coordinates(law: Law) -> np.ndarray:
    return np.array([*np.log(law.values[:3]), *law.shape])


def _set_out(law: Law, points: Points) -> np.ndarray:
    """Where a fit near a known law starts: where that law is, but not at E = 0.

    From there no step in ln E makes a difference, and E would stay 0 whatever the points say.
    """
    z = _coordinates(law)
    z[0] = max(z[0], np.log(0.05 * points.loss.min()))
    return z


def fit(points: Points, form: Form = LOG, start: Law | None = None) -> Fit:
    """The law of a form with the least Huber sum (delta 1e-3) over the points' log losses.

    L-BFGS in ln E, ln A, ln alpha and the shape parameters, which may be negative: streams may do
    harm. The best end of 6 or 12 starts is taken, or, given `start`, of that one alone.

    Raises:
      InputError: the points are too few.
    """
    check_identifiable(points)
    target = np.log(points.loss)
    starts = _starts(form, points) if start is None else [_set_out(start, points)]
    with _one_thread():
        ends = [_descend(form, points, target, z, tolerance=1e-6) for z in starts]
        best, _ = min(ends, key=lambda end: end[1])
        law = _law(form, _descend(form, points, target, best)[0])
    return Fit(law, objective(law, points), r2(law, points))


def bootstrap(points: Points, law: Law, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """Parameters refitted to losses redrawn about a fitted law: a residual bootstrap.

    N and P were chosen, not drawn, so they stay, and the residuals in log loss are redrawn. The fit
    passes through as many points as it has parameters, or nearly: those smallest residuals say
    nothing of the noise and are left out, which also restores the variance to SS / (n -
    parameters). The others are centred, and widened by the ratio of Student's to the normal
    quantile, so that percentiles allow for the few residuals behind them.

    Residuals are taken to be independent: several seeds of one N and P share the misfit of the form
    there, which the intervals then do not show in full.

    Returns:
      [draws, 3 + q] float64, columns as in `law.form.names`; each refit sets out from `law`.
    """
    predicted = log_loss(law.form, _coordinates(law), points)[0]
    z = _set_out(law, points)
    residuals = np.log(points.loss) - predicted
    residuals = residuals[np.argsort(np.abs(residuals))[min(len(z), len(points) - 2) :]]
    student = special.stdtrit(max(len(points) - len(z), 1), 0.975)
    residuals = (residuals - residuals.mean()) * student / special.ndtri(0.975)
    rng = np.random.default_rng(seed)
    targets = predicted + rng.choice(residuals, (draws, len(points)))
    with _one_thread():
        ends = [_descend(law.form, points, target, z, tolerance=1e-9)[0] for target in targets]
    return np.array([_law(law.form, end).values for end in ends])


def interval(samples: np.ndarray) -> np.ndarray:
    """95 % percentile intervals of bootstrap samples [draws, ...]: [2, ...], low and high."""
    return np.percentile(samples, (2.5, 97.5), axis=0)


def multiplier_samples(form: Form, samples: np.ndarray, streams: Sequence[int]) -> np.ndarray:
    """m(P) of every bootstrap draw: [draws, number of P]."""
    return np.array([Law(*row[:3], tuple(row[3:]), form).multiplier(streams) for row in samples])


def not_identified(samples: np.ndarray) -> list[str]:
    """Which of E, A, alpha have a 95 % interval that spans an order of magnitude, or reaches 0."""
    low, high = interval(samples[:, :3])
    wide = ~(high < 10 * low) | (low < ZERO)
    return [name for name, unknown in zip(LOG.names, wide, strict=False) if unknown]


def leave_one_out(points: Points, by: str, start: Law) -> list[LeftOut]:
    """Fits without each P, or without each size, in turn, and their errors on what was left out.

    Args:
      points: all of them.
      by: "streams" or "params"; a size is left out with all its P, see `law_points.sizes`.
      start: the law fitted to all points, from which the fits set out.
    """
    groups = {"streams": points.streams, "params": sizes(points)}[by]
    found = []
    for value in np.unique(groups):
        out, rest = points.where(groups == value), points.where(groups != value)
        try:
            law = fit(rest, start.form, start).law
        except InputError:
            found.append(LeftOut(float(value), None, np.zeros(0)))
            continue
        errors = law.loss(out.params, out.streams) - out.loss
        found.append(LeftOut(float(value), law, errors))
    return found
