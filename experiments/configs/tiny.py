"""A P = 4 byte-level model on the standard library's source: the first thing to run.

python -m experiments.train --config=experiments/configs/tiny.py --workdir=/tmp/tiny
"""

from models.config import ModelConfig
from parscale.config import Config, DataConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(width=128, layers=4, heads=4, kv_heads=2, mlp_width=352, streams=4),
        data=DataConfig(corpus="pystdlib", length=256, batch=16),
        train=TrainConfig(steps=400, learning_rate=3e-3, warmup_steps=40, checkpoint_minutes=1.0),
    )
