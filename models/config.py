"""The shape of a parallel-scaling language model."""

import dataclasses

from sharding.settings import InputError, check_at_least, check_choices, nearest, option

TRANSFORMS = ("prefix", "soft_tokens", "low_rank", "bias")
TRANSFORM_INITS = ("normal", "tokens")
AGGREGATIONS = ("dynamic", "constant", "mean")
ATTENTION = ("attention", "window")
RECURRENT = (
    "retention", "gla", "mlstm_exp", "mlstm_sigmoid", "delta_net", "gated_delta_net", "kda",
    "aaren",
)  # fmt: skip
MIXERS = ATTENTION + RECURRENT


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder with P streams, by default of the Qwen2 family.

    Axis letters in brackets as in the README.
    """

    vocab_size: int = option(256, "tokens in the vocabulary [V]")
    width: int = option(128, "width of the residual stream [D]")
    layers: int = option(4, "layers [L]")
    mixers: tuple[str, ...] = option(
        ("attention",), f"mixers of the layers, repeated over them, of {', '.join(MIXERS)}"
    )
    heads: int = option(4, "query heads of attention, value heads of a recurrent mixer [H]")
    kv_heads: int = option(2, "key/value heads; query/key heads of a recurrent mixer [K]")
    mlp_width: int = option(352, "width of the SwiGLU hidden layer [F]")
    qkv_bias: bool = option(True, "biases on the q, k and v projections of attention")
    window: int = option(1024, "positions that a window mixer sees, the token's own among them")
    key_dim: int = option(0, "head dimension of a recurrent mixer's keys [hk]; 0: width / heads")
    value_dim: int = option(0, "and of its values [hv]; 0: width / heads")
    conv_size: int = option(4, "tokens in a short convolution, the own among them (delta mixers)")
    tied_embeddings: bool = option(True, "the LM head is the token embedding")
    rope_theta: float = option(10000.0, "base of the rotary position embedding")
    norm_eps: float = option(1e-6, "epsilon of RMSNorm")
    init_std: float = option(0.02, "standard deviation of initial weights")
    branches: int = option(
        0, "branches of a fork that attention can tell apart by what it learns of each; 0: by none"
    )
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
            "transform_size", "max_length", "window", "conv_size",
        )  # fmt: skip
        check_at_least(
            self, 0, "branches", "key_dim", "value_dim", "norm_eps", "init_std", "transform_std",
        )  # fmt: skip
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
        self._check_mixers()
        if not 0.0 <= self.smoothing <= 1.0:
            raise InputError(f"smoothing={self.smoothing}: expected a value from 0 to 1")

    def _check_mixers(self):
        for name in self.mixers:
            if name not in MIXERS:
                raise InputError(
                    f"mixers={','.join(self.mixers)}: expected some of {', '.join(MIXERS)}"
                    + nearest(name, MIXERS)
                )
        if not self.mixers or self.layers % len(self.mixers):
            raise InputError(
                f"layers={self.layers} is not a multiple of the {len(self.mixers)} names in "
                f"mixers={','.join(self.mixers)}, which are repeated over the layers"
            )
        if "window" in self.mixers and self.streams > 1 and self.transform == "soft_tokens":
            raise InputError(
                "transform=soft_tokens: they would fall out of the window of a window mixer"
            )
        recurrent = [name for name in self.mixers if name in RECURRENT]
        if recurrent and self.transform_init == "tokens":
            raise InputError(
                f"transform_init=tokens: prefixes of attention start so, but {recurrent[0]} has "
                "initial states"
            )
        if "retention" in self.mixers and self.key_head_dim % 2:
            raise InputError(
                f"key_dim={self.key_dim} gives retention a head dimension of {self.key_head_dim}: "
                "rotary position embedding needs an even one"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head of attention [h]."""
        return self.width // self.heads

    @property
    def key_head_dim(self) -> int:
        """Width of one key of a recurrent mixer [hk]."""
        return self.key_dim or self.head_dim

    @property
    def value_head_dim(self) -> int:
        """Width of one value of a recurrent mixer [hv]."""
        return self.value_dim or self.head_dim


def check_forks(config: ModelConfig) -> None:
    """Raises InputError if a text that forks and joins is not for such a model."""
    for name in config.mixers:
        if name != "attention":
            raise InputError(
                f"mixers={','.join(config.mixers)}: {name} reads a text in one line; one whose "
                "branches join, or do not see each other, is for attention alone"
            )
