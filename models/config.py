"""The shape of a parallel-scaling language model."""

import dataclasses

from sharding.settings import InputError, check_at_least, check_choices, option

TRANSFORMS = ("prefix", "soft_tokens", "low_rank", "bias")
TRANSFORM_INITS = ("normal", "tokens")
AGGREGATIONS = ("dynamic", "constant", "mean")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Qwen2-family decoder with P streams. Axis letters in brackets as in the README."""

    vocab_size: int = option(256, "tokens in the vocabulary [V]")
    width: int = option(128, "width of the residual stream [D]")
    layers: int = option(4, "layers [L]")
    heads: int = option(4, "query heads [H]")
    kv_heads: int = option(2, "key/value heads [K]")
    mlp_width: int = option(352, "width of the SwiGLU hidden layer [F]")
    qkv_bias: bool = option(True, "biases on the q, k and v projections")
    tied_embeddings: bool = option(True, "the LM head is the token embedding")
    rope_theta: float = option(10000.0, "base of the rotary position embedding")
    norm_eps: float = option(1e-6, "epsilon of RMSNorm")
    init_std: float = option(0.02, "standard deviation of initial weights")
    max_length: int = option(2048, "positions the model is meant for", resume="free")

    streams: int = option(1, "parallel streams [P]; 1 is the plain model", resume="growable")
    transform: str = option("prefix", "what makes the streams differ", choices=TRANSFORMS)
    transform_size: int = option(48, "prefix slots, soft tokens, or rank of the low-rank delta [M]")
    transform_std: float = option(0.02, "standard deviation of the transform's initial values")
    transform_init: str = option(
        "normal",
        "initial values of the transform; tokens: keys and values of vocabulary tokens (prefix)",
        choices=TRANSFORM_INITS,
    )
    aggregation: str = option("dynamic", "how the streams are mixed", choices=AGGREGATIONS)
    smoothing: float = option(0.1, "share of the mixing weights that is spread evenly (epsilon)")

    dtype: str = option(
        "float32", "type of activations and matmul inputs", choices=("float32", "bfloat16")
    )
    layer_loop: str = option(
        "auto",
        "scan over layers, or unroll them; auto unrolls on CPU, where that is faster",
        resume="free",
        choices=("auto", "scan", "unroll"),
    )
    remat: str = option(
        "none",
        "what the backward pass recomputes: nothing, all of a layer, or all but its matmuls",
        resume="free",
        choices=("none", "full", "dots"),
    )

    def __post_init__(self):
        check_choices(self)
        check_at_least(
            self, 1, "vocab_size", "width", "layers", "heads", "kv_heads", "mlp_width", "streams",
            "transform_size", "max_length",
        )  # fmt: skip
        check_at_least(self, 0, "norm_eps", "init_std", "transform_std")
        if self.rope_theta <= 0:
            raise InputError(f"rope_theta={self.rope_theta}: expected more than 0")
        if self.width % self.heads:
            raise InputError(
                f"width={self.width} is not divisible by heads={self.heads}: "
                "the head dimension would not be whole"
            )
        if self.head_dim % 2:
            raise InputError(
                f"width={self.width} over heads={self.heads} gives a head dimension of "
                f"{self.head_dim}: rotary position embedding needs an even one"
            )
        if self.heads % self.kv_heads:
            raise InputError(
                f"heads={self.heads} is not divisible by kv_heads={self.kv_heads}: "
                "every key/value head must serve the same number of query heads"
            )
        if self.transform_init == "tokens" and self.transform != "prefix":
            raise InputError(
                f"transform_init=tokens: only transform=prefix starts so, not {self.transform}"
            )
        if not 0.0 <= self.smoothing <= 1.0:
            raise InputError(f"smoothing={self.smoothing}: expected a value from 0 to 1")

    @property
    def head_dim(self) -> int:
        """Width of one head [h]."""
        return self.width // self.heads
