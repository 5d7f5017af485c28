"""The learning rates among which `law_cpu` has chosen one for each size, at P = 1.

    python -m experiments.scaling_law sweep --config=experiments/configs/law_cpu_rates.py \
      --workdir=/tmp/law_rates
"""

from experiments.configs.law_cpu import BASE, SIZES, seeds
from parscale.sweep import Sweep, product, values


def get_sweep() -> Sweep:
    rates = values("train.learning_rate", 2e-3, 4e-3, 8e-3, 16e-3, label="r")
    # The best of the smallest size was the highest of these.
    more = values("train.learning_rate", 32e-3, label="r")
    return Sweep(BASE, product(SIZES, rates, seeds(1)) + product(SIZES[:1], more, seeds(1)))
