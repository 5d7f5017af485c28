"""What the six shapes of the ParScale paper (arXiv 2505.10475) have in common.

Published, of the runs behind the scaling law: 36 layers, 16 query and 2 key/value heads, Qwen2.5's
vocabulary, tied embeddings, 48 prefix slots, smoothing 0.1, bfloat16, 42 billion tokens in batches
of 1024 rows of 2048 tokens (20,027 steps), Adam.

Not published, and our choice: learning rate 3e-4 with 2000 steps of warm-up (said at second hand of
the paper's later stage), then a cosine down to a tenth; AdamW with betas 0.9 and 0.95 and weight
decay 0.1; clipping at 1; documents packed without seeing each other. Also ours, and free to change:
recomputing each layer in the backward pass, and parameters split over all devices (`fsdp`).
"""

from models.config import ModelConfig
from parscale.config import Config, DataConfig, TrainConfig
from sharding.mesh import MeshConfig

TOKENS = 42_000_000_000
BATCH = 1024
LENGTH = 2048


def paper_config(width: int, mlp_width: int) -> Config:
    """The recipe for a model of this width [D] and MLP width [F], with one stream."""
    return Config(
        model=ModelConfig(
            vocab_size=151936,
            width=width,
            layers=36,
            heads=16,
            kv_heads=2,
            mlp_width=mlp_width,
            max_length=LENGTH,
            dtype="bfloat16",
            remat="full",
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
        data=DataConfig(corpus="corpus", tokenizer="tokenizer.json", length=LENGTH, batch=BATCH),
        train=TrainConfig(
            steps=round(TOKENS / (BATCH * LENGTH)), learning_rate=3e-4, warmup_steps=2000
        ),
    )
