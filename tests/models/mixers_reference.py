"""The recurrent mixers as their papers define them: float64 NumPy, one row, token by token."""

import numpy as np

NORM_EPS = 1e-2


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def project(x, weight):
    return np.tensordot(x, weight, 1)


def short_convolution(x, taps):
    """silu of a weighted sum of the last inputs of each channel."""
    y = np.zeros_like(x)
    for t in range(len(x)):
        for back in range(min(len(taps), t + 1)):
            y[t] += taps[-1 - back] * x[t - back]
    return silu(y)


def rotate(x, theta=10000.0):
    """Pairs of a head's first and second half, rotated by the position."""
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    angles = np.outer(np.arange(len(x)), theta ** (-np.arange(half) / half))
    pairs = pairs * np.exp(1j * angles)[:, None]
    return np.concatenate([pairs.real, pairs.imag], -1)


def unit(x):
    return x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)


def soft_cap(x):
    return 15 * np.tanh(x / 15)


def recurrence(q, k, v, state, *, decay=None, weight=None, beta=None, normalizer=None):
    """Outputs `[T, H, hv]` and the last states.

    `decay` `[T, H, hk]` and `weight` `[T, H]` are factors, not logarithms; `state` `[H, hk, hv]`.
    """
    length, heads = v.shape[:2]
    state, out = state.copy(), np.zeros_like(v)
    normalizer = None if normalizer is None else normalizer.copy()
    for t in range(length):
        for j in range(heads):
            key, query = (x[t, j // (heads // x.shape[1])] for x in (k, q))
            if decay is not None:
                state[j] *= decay[t, j][:, None]
            if beta is not None:
                state[j] -= beta[t, j] * np.outer(key, key @ state[j])
            strength = 1.0 if weight is None else weight[t, j]
            strength = strength if beta is None else beta[t, j]
            state[j] += strength * np.outer(key, v[t, j])
            out[t, j] = query @ state[j] / np.sqrt(len(key))
            if normalizer is not None:
                normalizer[j] = decay[t, j] * normalizer[j] + strength * key
                out[t, j] /= max(abs(query @ normalizer[j]) / np.sqrt(len(key)), 1.0)
    return out, state, normalizer


def norm(x, scale, eps=NORM_EPS):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * scale


def finish(out, w, gate=None):
    out = out if gate is None else out * gate
    return np.tensordot(out, w["o"], 2)


def start(w, stream):
    return w["streams"]["matrix"][stream]


def retention(w, x, stream):
    q, k, v = (project(x, w[name]) for name in "qkv")
    heads = np.arange(v.shape[1])
    decay = np.broadcast_to((1 - 2.0 ** (-5 - heads))[:, None], (*v.shape[:2], q.shape[-1]))
    out, *_ = recurrence(rotate(q), rotate(k), v, start(w, stream), decay=decay)
    return finish(norm(out, w["norm"]["scale"]), w, silu(project(x, w["gate"])))


def gla(w, x, stream):
    q, k, v = (project(x, w[name]) for name in "qkv")
    gate = project(project(x, w["decay_down"]), w["decay_up"]) + w["decay_bias"]
    out, *_ = recurrence(q, k, v, start(w, stream), decay=sigmoid(gate) ** (1 / 16))
    return finish(norm(out, w["norm"]["scale"]), w, silu(project(x, w["gate"])))


def mlstm(w, x, stream, exponential):
    q, k, v = (project(x, w[name]) for name in "qkv")
    into = soft_cap(project(x, w["input_gate"]) + w["input_bias"])
    forget = sigmoid(soft_cap(project(x, w["forget_gate"]) + w["forget_bias"]))
    out, *_ = recurrence(
        q, k, v, start(w, stream),
        decay=np.broadcast_to(forget[..., None], (*forget.shape, q.shape[-1])),
        weight=np.exp(into) if exponential else sigmoid(into),
        normalizer=w["streams"]["normalizer"][stream] if exponential else None,
    )  # fmt: skip
    out = out - out.mean(-1, keepdims=True)
    return finish(norm(out, w["norm"]["scale"]), w, sigmoid(project(x, w["gate"])))


def mlstm_exp(w, x, stream):
    return mlstm(w, x, stream, True)


def mlstm_sigmoid(w, x, stream):
    return mlstm(w, x, stream, False)


def delta(w, x, stream, decay=None):
    q, k, v = (short_convolution(project(x, w[name]), w["conv"][name]) for name in "qkv")
    beta = sigmoid(project(x, w["beta"]))
    out, *_ = recurrence(unit(q), unit(k), v, start(w, stream), decay=decay, beta=beta)
    return norm(out, w["norm"]["scale"])


def delta_net(w, x, stream):
    return finish(delta(w, x, stream), w)


def gated_delta_net(w, x, stream):
    step = softplus(project(x, w["time_step"]) + w["time_bias"])
    decay = np.exp(-np.exp(w["log_rate"]) * step)
    decay = np.broadcast_to(decay[..., None], (*decay.shape, w["q"].shape[-1]))
    return finish(delta(w, x, stream, decay), w, silu(project(x, w["gate"])))


def kda(w, x, stream):
    step = softplus(project(project(x, w["decay_down"]), w["decay_up"]) + w["time_bias"])
    decay = np.exp(-np.exp(w["log_rate"])[:, None] * step)
    gate = project(project(x, w["gate_down"]), w["gate_up"]) + w["gate_bias"]
    return finish(delta(w, x, stream, decay), w, sigmoid(gate))


def aaren(w, x, stream):
    k, v = project(x, w["k"]), project(x, w["v"])
    score = np.einsum("thk,hk->th", k, w["q"]) / np.sqrt(k.shape[-1])
    score = np.concatenate([w["streams"]["score"][stream][None], score])
    v = np.concatenate([w["streams"]["value"][stream][None], v])
    out = []
    for t in range(2, len(v) + 1):
        weight = np.exp(score[:t] - score[:t].max(0))
        out.append(np.einsum("th,thv->hv", weight / weight.sum(0), v[:t]))
    return finish(np.stack(out), w)
