"""The mixers of layers by the names that configurations give them."""

from models.aaren import Aaren
from models.attention import Attention, WindowAttention
from models.delta import DeltaNet, GatedDeltaNet, KimiDeltaAttention
from models.mlstm import ExponentialMLSTM, SigmoidMLSTM
from models.retention import GatedLinearAttention, Retention

MIXERS = {
    "attention": Attention,
    "window": WindowAttention,
    "retention": Retention,
    "gla": GatedLinearAttention,
    "mlstm_exp": ExponentialMLSTM,
    "mlstm_sigmoid": SigmoidMLSTM,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "kda": KimiDeltaAttention,
    "aaren": Aaren,
}
"""Each is called `mixer(x, context, cache)` and makes its memory by `init_state`; attention to all
positions makes it by `init_blocks`."""
