"""Where each tensor of a Hugging Face file of the Qwen2 family lives in our model.

Linear weights are `[out, in]` there and `[in, *out]` here. The first matrix of the aggregation
reads its input d-major, p-minor there, as the authors' checkpoints hold it.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from models.config import ModelConfig

Layout = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor of a Hugging Face file lives in our model.

    Attributes:
      path: names from the model down to the weight.
      layer: index into the stacked weight, or None where it is not stacked.
      shape: shape in the file.
      read: from the file's layout to ours.
      write: from ours to the file's.
    """

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    read: Layout
    write: Layout


def tensor_table(config: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face file by name."""
    width, hidden, streams = config.width, config.mlp_width, config.streams

    def same(array):
        return array

    def linear(path, layer, out: tuple[int, ...]) -> Tensor:
        """[prod(out), in] there, [in, *out] here."""
        size = int(np.prod(out))
        return Tensor(
            path, layer, (size, width),
            lambda array: array.T.reshape(width, *out),
            lambda array: array.reshape(width, size).T,
        )  # fmt: skip

    def into_width(path, layer, inner: tuple[int, ...]) -> Tensor:
        """[D, prod(inner)] there, [*inner, D] here."""
        size = int(np.prod(inner))
        return Tensor(
            path, layer, (width, size),
            lambda array: array.T.reshape(*inner, width),
            lambda array: array.reshape(size, width).T,
        )  # fmt: skip

    def bias(path, layer, shape: tuple[int, ...]) -> Tensor:
        size = int(np.prod(shape))
        return Tensor(
            path,
            layer,
            (size,),
            lambda array: array.reshape(shape),
            lambda array: array.reshape(-1),
        )

    def plain(path, layer, shape: tuple[int, ...]) -> Tensor:
        return Tensor(path, layer, shape, same, same)

    table = {
        "model.embed_tokens.weight": plain(("embedding",), None, (config.vocab_size, width)),
        "model.norm.weight": plain(("norm", "scale"), None, (width,)),
    }
    if not config.tied_embeddings:
        table["lm_head.weight"] = linear(("head",), None, (config.vocab_size,))
    if streams > 1:
        table |= {
            "model.aggregate_layer.0.weight": Tensor(
                ("aggregation", "hidden"), None, (width, width * streams),
                lambda array: array.reshape(width, width, streams).transpose(2, 1, 0),
                lambda array: array.transpose(2, 1, 0).reshape(width, width * streams),
            ),
            "model.aggregate_layer.0.bias": plain(("aggregation", "hidden_bias"), None, (width,)),
            "model.aggregate_layer.2.weight": linear(("aggregation", "out"), None, (streams,)),
            "model.aggregate_layer.2.bias": plain(("aggregation", "out_bias"), None, (streams,)),
        }  # fmt: skip
    for layer in range(config.layers):
        name = f"model.layers.{layer}"
        mixer, mlp = ("layers", "mixer"), ("layers", "mlp")
        head_axes = {"q": config.heads, "k": config.kv_heads, "v": config.kv_heads}
        for letter, heads in head_axes.items():
            out = (heads, config.head_dim)
            table[f"{name}.self_attn.{letter}_proj.weight"] = linear((*mixer, letter), layer, out)
            table[f"{name}.self_attn.{letter}_proj.bias"] = bias(
                (*mixer, f"{letter}_bias"), layer, out
            )
        table |= {
            f"{name}.self_attn.o_proj.weight": into_width(
                (*mixer, "o"), layer, (config.heads, config.head_dim)
            ),
            f"{name}.mlp.gate_proj.weight": linear((*mlp, "gate"), layer, (hidden,)),
            f"{name}.mlp.up_proj.weight": linear((*mlp, "up"), layer, (hidden,)),
            f"{name}.mlp.down_proj.weight": into_width((*mlp, "down"), layer, (hidden,)),
            f"{name}.input_layernorm.weight": plain(
                ("layers", "mixer_norm", "scale"), layer, (width,)
            ),
            f"{name}.post_attention_layernorm.weight": plain(
                ("layers", "mlp_norm", "scale"), layer, (width,)
            ),
        }
        if streams > 1:
            shape = (streams, config.kv_heads, config.transform_size, config.head_dim)
            for letter in ("k", "v"):
                table[f"{name}.self_attn.prefix_{letter}"] = plain(
                    (*mixer, "streams", letter), layer, shape
                )
    return table
