"""The mLSTM: input and forget gates of one number for each head."""

import jax
import jax.numpy as jnp

from models.config import ModelConfig
from models.recurrent import CenteredHeadNorm, NormalizedInitialState, Recurrent
from models.weights import WeightMaker, constant, linspace

GATE_CAP = 15.0
INPUT_BIAS = -10.0
FORGET_BIAS = (3.0, 6.0)


class SigmoidMLSTM(Recurrent):
    """mLSTM with sigmoid gates and no normalizer (arXiv 2503.14376).

    Both gates are a c tanh(x / c) of a projection with a bias, c = 15; that of the input begins at
    -10, of the forget gate at 3 to 6 over the heads. Each head's output is centered, normed and
    gated by a sigmoid of a projection of the input.
    """

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        super().__init__(config, weight)
        width, heads = config.width, config.heads
        self.gate = weight((width, heads, config.value_head_dim), ("embed", "heads", "head_dim"))
        self.input_gate = weight((width, heads), ("embed", "heads"))
        self.input_bias = weight((heads,), ("heads",), constant(INPUT_BIAS))
        self.forget_gate = weight((width, heads), ("embed", "heads"))
        self.forget_bias = weight((heads,), ("heads",), linspace(*FORGET_BIAS))

    def make_norm(self, config, weight):
        return CenteredHeadNorm(config, weight)

    def inputs(self):
        return self.gate, self.input_gate, self.forget_gate

    def log_input_gate(self, x):
        """Logarithm of the input gate, given what it depends on."""
        return jax.nn.log_sigmoid(x)

    def recurrence(self, q, k, v, inputs, context):
        gate, into, forget = inputs
        into = _soft_cap(into.astype(jnp.float32) + self.input_bias[...])
        forget = _soft_cap(forget.astype(jnp.float32) + self.forget_bias[...])
        arguments = {
            "q": q,
            "k": k,
            "v": v,
            "log_decay": jax.nn.log_sigmoid(forget),
            "input_gate": self.log_input_gate(into),
        }
        return arguments, jax.nn.sigmoid(gate)


class ExponentialMLSTM(SigmoidMLSTM):
    """mLSTM with an exponential input gate and a normalizer (arXiv 2405.04517)."""

    initial = NormalizedInitialState

    def log_input_gate(self, x):
        return x

    def recurrence(self, q, k, v, inputs, context):
        arguments, gate = super().recurrence(q, k, v, inputs, context)
        return arguments | {"normalize": True}, gate


def _soft_cap(x):
    return GATE_CAP * jnp.tanh(x / GATE_CAP)
