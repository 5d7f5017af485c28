"""Kimi delta attention (arXiv 2510.26692) for attention: tiny with another mixer.

    python -m experiments.train --config=tiny_kda --workdir=tiny_kda

Width, layers, data and steps of tiny, whose number of parameters the width of the MLP keeps.
Hardware and time: 2 CPU cores, minutes. Expected: 2.29 bits per byte, where tiny has 2.53.
"""

import dataclasses

from experiments.configs import tiny
from parscale.config import Config


def get_config() -> Config:
    config = tiny.get_config()
    model = dataclasses.replace(config.model, mixers=("kda",), kv_heads=4, mlp_width=280)
    return dataclasses.replace(config, model=model)
