"""Three layers of gated DeltaNet, then one of attention: tiny with two kinds of mixers.

    python -m experiments.train --config=tiny_hybrid --workdir=tiny_hybrid

Width, layers, data and steps of tiny, whose number of parameters the width of the MLP keeps.
Hardware and time: 2 CPU cores, minutes. Expected: 2.25 bits per byte, where tiny has 2.53.
"""

import dataclasses

from experiments.configs import tiny
from parscale.config import Config


def get_config() -> Config:
    config = tiny.get_config()
    mixers = ("gated_delta_net", "gated_delta_net", "gated_delta_net", "attention")
    model = dataclasses.replace(config.model, mixers=mixers, kv_heads=4, mlp_width=272)
    return dataclasses.replace(config, model=model)
