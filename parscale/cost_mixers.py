"""What one layer's mixer computes, reads and keeps in a forward pass of decoding, by its kind."""

from typing import NamedTuple

import numpy as np

from models.config import ATTENTION, ModelConfig
from parscale import flops

STATE_BYTES = 4


class MixerWork(NamedTuple):
    """Of one layer; arrays where `before` is one.

    Attributes:
      projected: multiply-adds of its products with weights.
      weights: elements of the weights read there.
      channels: activations read and written around those products.
      mixed: multiply-adds of scores and weighted values, or of products with the state.
      slots: elements of the prefixes that are read; initial states are by then in the cache.
      moved: activations read and written around the mixing, the cache's among them.
      state: bytes of recurrent states read and written.
    """

    projected: float
    weights: float
    channels: float
    mixed: float | np.ndarray
    slots: float
    moved: float | np.ndarray
    state: float


def mixer_work(
    model: ModelConfig, size: flops.MixerSize, batch: int, tokens: int, before: int | np.ndarray
) -> MixerWork:
    """Work of the mixer `size`; other arguments as for `parscale.cost.forward_work`."""
    D, P = model.width, model.streams
    new = batch * P * tokens
    own = model.transform if P > 1 else "none"
    is_attention = size.mixer in ATTENTION
    out = D if is_attention else model.heads * model.value_head_dim
    delta = size.streams / P if own == "low_rank" else 0
    common = {
        "projected": new * (size.matrices + delta),
        "weights": size.shared + (size.streams if own in ("low_rank", "bias") else 0),
        "channels": new * (D + (size.matrices - out * D) / D + out + D),
    }
    if is_attention:
        window = model.window if size.mixer == "window" else before + tokens
        kv_width = model.kv_heads * model.head_dim
        slots = model.transform_size if own == "prefix" else 0
        # The first tokens see all before them, the others a whole window.
        growing = np.clip(window - before, 0, tokens)
        seen = growing * before + growing * (growing + 1) / 2 + (tokens - growing) * window
        held = np.minimum(before, window)
        # All of the cache is read, the new keys and values are written.
        cached = batch * P * (held + 2 * tokens) * 2 * kv_width
        return MixerWork(
            **common,
            slots=size.streams if slots else 0,
            mixed=2 * D * (batch * P * seen + new * slots),
            moved=cached + 2 * new * D,
            state=0,
        )
    narrow, wide = cache_elements(model, size.mixer, 0)
    keys = model.heads if size.mixer == "aaren" else 2 * model.kv_heads
    return MixerWork(
        **common,
        slots=0,
        mixed=new * flops.recurrence_macs(model, size.mixer),
        moved=2 * batch * P * narrow + new * (keys * model.key_head_dim + 2 * out),
        state=2 * batch * P * STATE_BYTES * wide,
    )


def cache_elements(model: ModelConfig, mixer: str, length: int) -> tuple[int, int]:
    """What a layer keeps of each row and stream: elements of activations' type, and float32 ones.

    Args:
      model: the model.
      mixer: of the layer.
      length: positions of the cache.
    """
    hk, hv = model.key_head_dim, model.value_head_dim
    if mixer in ATTENTION:
        slots = min(model.window, length) if mixer == "window" else length
        return 2 * slots * model.kv_heads * model.head_dim, 0
    if mixer == "aaren":
        return 0, model.heads * (2 + hv)
    state = model.heads * hk * hv
    if mixer == "mlstm_exp":
        return 0, state + model.heads * (hk + 1)
    inputs = 2 * model.kv_heads * hk + model.heads * hv
    return (model.conv_size - 1) * inputs if mixer in flops.DELTA_RULE else 0, state
