"""A small parallel scaling law that two CPU cores train: 3 sizes x P in {1, 2, 4, 8} x 3 seeds.

    python -m experiments.scaling_law sweep --config=experiments/configs/law_cpu.py \
      --workdir=/tmp/law

Every run learns from the same number of bytes in the same order (the seed decides which), so that
runs of one size and seed differ in P alone. The learning rate of each size is the best of those
that `law_cpu_rates` tries at P = 1. A whole seed comes before the next, so that a sweep that is
stopped early has every size with every P. What came of it is in experiments/results/.
"""

from models.config import ModelConfig
from parscale.config import Config, DataConfig, TrainConfig
from parscale.sweep import Sweep, product, values, zipped

BASE = Config(
    model=ModelConfig(layers=3, transform_size=4, transform_init="tokens", init_std=0.06),
    data=DataConfig(corpus="pystdlib", length=128, batch=8),
    train=TrainConfig(
        steps=400, warmup_steps=40, eval_rows=512, sample_tokens=0, checkpoint_minutes=2.0, keep=1
    ),
)
WIDTHS = (32, 48, 64)
SIZES = zipped(
    values("model.width", *WIDTHS, label="D"),
    values("model.heads", 2, 3, 4),
    values("model.kv_heads", 1, 1, 1),
    values("model.mlp_width", 88, 132, 176),
)
RATES = values("train.learning_rate", 16e-3, 8e-3, 4e-3)


def seeds(count: int) -> list:
    """Seeds 0, 1, ...: of the initial weights and of the order of the text."""
    numbers = range(count)
    return zipped(values("train.seed", *numbers, label="s"), values("data.seed", *numbers))


def get_sweep() -> Sweep:
    streams = values("model.streams", 1, 2, 4, 8, label="P")
    return Sweep(BASE, product(seeds(3), zipped(SIZES, RATES), streams))
