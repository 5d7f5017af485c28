"""Aaren (arXiv 2405.13956) for attention: tiny with another mixer.

    python -m experiments.train --config=tiny_aaren --workdir=tiny_aaren

Width, layers, data and steps of tiny, whose number of parameters the width of the MLP keeps.
Hardware and time: 2 CPU cores, minutes. Expected: 3.39 bits per byte, where tiny has 2.53.
"""

import dataclasses

from experiments.configs import tiny
from parscale.config import Config


def get_config() -> Config:
    config = tiny.get_config()
    model = dataclasses.replace(config.model, mixers=("aaren",), kv_heads=4, mlp_width=416)
    return dataclasses.replace(config, model=model)
