"""Retention and gated linear attention: the state decays, and every token is written whole."""

import jax
import jax.numpy as jnp

from models.config import ModelConfig
from models.layers import apply_rope, project
from models.recurrent import Recurrent, low_rank
from models.weights import WeightMaker, zeros
from pallas_kernels.linear.forms import retention_decay

GATE_RANK = 16
GATE_DIVISOR = 16.0


class Retention(Recurrent):
    """Multi-scale retention (arXiv 2307.08621).

    Value head j decays by 1 - 2^(-5 - j) a token, queries and keys are rotated by their positions,
    each head's output is normed and gated by silu of a projection of the input.
    """

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        super().__init__(config, weight)
        shape = (config.width, config.heads, config.value_head_dim)
        self.gate = weight(shape, ("embed", "heads", "head_dim"))

    def inputs(self):
        return (self.gate,)

    def recurrence(self, q, k, v, inputs, context):
        rope = context.rope[q.shape[-1]]
        arguments = {
            "q": apply_rope(q, rope),
            "k": apply_rope(k, rope),
            "v": v,
            "log_decay": retention_decay(v),
        }
        return arguments, jax.nn.silu(inputs[0])


class GatedLinearAttention(Recurrent):
    """Gated linear attention (arXiv 2312.06635).

    Every dimension of a head's keys has a decay of its own, the 16th root of a sigmoid of a
    projection of rank 16; the output is normed and gated as in retention. No positions.
    """

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        super().__init__(config, weight)
        shape = (config.width, config.heads, config.value_head_dim)
        self.gate = weight(shape, ("embed", "heads", "head_dim"))
        hk = config.key_head_dim
        self.decay_down, self.decay_up = low_rank(weight, config, GATE_RANK, hk)
        self.decay_bias = weight((config.heads, hk), ("heads", "head_dim"), zeros)

    def inputs(self):
        return self.gate, self.decay_down

    def recurrence(self, q, k, v, inputs, context):
        gate, down = inputs
        decay = project(down, self.decay_up[...])[0].astype(jnp.float32) + self.decay_bias[...]
        log_decay = jax.nn.log_sigmoid(decay) / GATE_DIVISOR
        return {"q": q, "k": k, "v": v, "log_decay": log_decay}, jax.nn.silu(gate)
