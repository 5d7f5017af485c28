"""The delta rule: a token first takes from the state what stands at its key, then writes there."""

import jax
import jax.numpy as jnp

from models.config import ModelConfig
from models.layers import project
from models.recurrent import Recurrent, low_rank, unit_norm
from models.weights import WeightMaker, log_uniform, softplus_inverse_of, zeros

# Of Mamba-2 (arXiv 2405.21060): the decay is exp(-A softplus(x + bias)).
DECAY_RATES = (1.0, 16.0)
TIME_STEPS = (1e-3, 1e-1)


class DeltaNet(Recurrent):
    """DeltaNet (arXiv 2406.06484).

    q, k and v go through short convolutions and silu, q and k are then of norm 1; a sigmoid of a
    projection is the strength of the update; each head's output is normed.
    """

    convolved = True

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        super().__init__(config, weight)
        self.beta = weight((config.width, config.heads), ("embed", "heads"))

    def inputs(self):
        return (self.beta,)

    def recurrence(self, q, k, v, inputs, context):
        beta = jax.nn.sigmoid(inputs[0].astype(jnp.float32))
        return {"q": unit_norm(q), "k": unit_norm(k), "v": v, "beta": beta}, None


class GatedDeltaNet(DeltaNet):
    """Gated DeltaNet (arXiv 2412.06464).

    DeltaNet whose state decays by exp(-A softplus(x W + b)), a number for each head, and whose
    output is gated by silu of a projection of the input.
    """

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        super().__init__(config, weight)
        width, heads = config.width, config.heads
        self.gate = weight((width, heads, config.value_head_dim), ("embed", "heads", "head_dim"))
        self.time_step = weight((width, heads), ("embed", "heads"))
        self.time_bias = weight((heads,), ("heads",), softplus_inverse_of(*TIME_STEPS))
        self.log_rate = weight((heads,), ("heads",), log_uniform(*DECAY_RATES))

    def inputs(self):
        return self.beta, self.gate, self.time_step

    def recurrence(self, q, k, v, inputs, context):
        beta, gate, step = inputs
        arguments, _ = super().recurrence(q, k, v, [beta], context)
        step = jax.nn.softplus(step.astype(jnp.float32) + self.time_bias[...])
        arguments["log_decay"] = -jnp.exp(self.log_rate[...]) * step
        return arguments, jax.nn.silu(gate)


class KimiDeltaAttention(DeltaNet):
    """Kimi delta attention (arXiv 2510.26692).

    Gated DeltaNet with a decay for every dimension of a head's keys, through a projection of the
    rank of a head, and an output gate that is a sigmoid, through another.
    """

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        super().__init__(config, weight)
        heads, hk, hv = config.heads, config.key_head_dim, config.value_head_dim
        self.decay_down, self.decay_up = low_rank(weight, config, hv, hk)
        self.gate_down, self.gate_up = low_rank(weight, config, hv, hv)
        self.gate_bias = weight((heads, hv), ("heads", "head_dim"), zeros)
        axes = ("heads", "head_dim")
        self.time_bias = weight((heads, hk), axes, softplus_inverse_of(*TIME_STEPS))
        self.log_rate = weight((heads,), ("heads",), log_uniform(*DECAY_RATES))

    def inputs(self):
        return self.beta, self.decay_down, self.gate_down

    def recurrence(self, q, k, v, inputs, context):
        beta, decay, gate = inputs
        arguments, _ = super().recurrence(q, k, v, [beta], context)
        step = project(decay, self.decay_up[...])[0].astype(jnp.float32)
        step = jax.nn.softplus(step + self.time_bias[...])
        arguments["log_decay"] = -jnp.exp(self.log_rate[...])[:, None] * step
        gate = project(gate, self.gate_up[...])[0].astype(jnp.float32) + self.gate_bias[...]
        return arguments, jax.nn.sigmoid(gate)
