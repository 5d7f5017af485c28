"""About 25 M parameters, four streams, byte level, for one GPU.

    python -m experiments.train --config=small --workdir=small

Trains on the sources of the installed packages (`pypackages`, about 60 MB, so about 60 million
tokens): 5000 steps of 65,536 tokens, which is between five and six times through.

Hardware, time and expected figure: meant for one GPU of 24 GB or more, and not yet run; on a CPU it
is too slow to be of use (see tiny). Shape and recipe are our choice; nothing here was tuned.
"""

from models.config import ModelConfig
from parscale.config import Config, DataConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            width=512, layers=8, heads=8, kv_heads=2, mlp_width=1536, streams=4, dtype="bfloat16"
        ),
        data=DataConfig(corpus="pypackages", length=1024, batch=64),
        train=TrainConfig(steps=5000, learning_rate=1e-3, warmup_steps=250, eval_every=1000),
    )
