"""Retention (arXiv 2307.08621) for attention: tiny with another mixer.

    python -m experiments.train --config=tiny_retention --workdir=tiny_retention

Width, layers, data and steps of tiny, whose number of parameters the width of the MLP keeps.
Hardware and time: 2 CPU cores, minutes. Expected: 2.74 bits per byte, where tiny has 2.53.
"""

import dataclasses

from experiments.configs import tiny
from parscale.config import Config


def get_config() -> Config:
    config = tiny.get_config()
    model = dataclasses.replace(config.model, mixers=("retention",), kv_heads=4, mlp_width=288)
    return dataclasses.replace(config, model=model)
