"""A P = 4 byte-level model on the standard library's source: the first thing to run.

    python -m experiments.train --config=experiments/configs/tiny.py --workdir=/tmp/tiny

Hardware and time: 2 CPU cores, under five minutes. Expected: 2.53 bits per byte on Python 3.11.7's
library, where a bigram model has 3.62 and a trigram model 2.74.
Initial weights are larger than the customary 0.02, which at this width costs the first few hundred
steps: at P = 1, 300 steps ended at 2.55 bits per byte with 0.06 and at 3.01 with 0.02.
"""

from models.config import ModelConfig
from parscale.config import Config, DataConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            width=128, layers=4, heads=4, kv_heads=2, mlp_width=352, streams=4, init_std=0.06
        ),
        data=DataConfig(corpus="pystdlib", length=256, batch=8),
        train=TrainConfig(
            steps=360, learning_rate=4e-3, warmup_steps=40, eval_every=200, checkpoint_minutes=1.0
        ),
    )
