"""Tensor-parallel partitions of a model whose weights carry no logical axes: an imported one.

Two rules, after Redco (arXiv 2310.16355). Names that the field agrees on come in pairs: queries,
keys, values and what enters an MLP divide their outputs, what leaves attention or MLP divides its
inputs, so that a pair needs one sum over devices. Other matrices take turns, outputs first, so that
what one leaves divided the next takes divided.
"""

import re
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from sharding.settings import InputError

OUTPUTS = {
    "c_attn", "c_fc", "fc1", "fc_in", "gate", "gate_proj", "head", "in_proj", "k", "k_proj", "key",
    "lm_head", "q", "q_proj", "qkv", "query", "up", "up_proj", "v", "v_proj", "value", "wi", "wi_0",
    "wi_1",
}  # fmt: skip
"""Modules that divide their outputs."""
INPUTS = {
    "c_proj", "down", "down_proj", "fc2", "fc_out", "o", "o_proj", "out", "out_proj", "wo",
}  # fmt: skip
"""Modules that divide their inputs."""
TABLES = {"embed", "embed_tokens", "embedding", "shared", "token_embedding", "wte"}
"""Tables of vectors, `[V, D]` in every framework: they divide the vocabulary."""
KERNELS = {"kernel", "weight", "w"}
"""What frameworks call the matrix of a module: its own name says nothing."""

Shapes = Mapping[str, Any]


def tensor_parallel_specs(
    shapes: Shapes,
    parts: int,
    *,
    axis: str = "tensor",
    stacked: str | None = None,
    outputs_first: bool = False,
) -> dict[str, Any]:
    """A partition over one mesh axis for every weight.

    Args:
      shapes: nested mapping of arrays, or of anything with a `shape`; its order should be that of
        the network, in which matrices without a known name take turns.
      parts: devices along the mesh axis.
      axis: the mesh axis.
      stacked: the part of a path below which weights of all layers are stacked along a first axis.
      outputs_first: whether kernels are `[out, in]`, as PyTorch has them, rather than
        `[in, *out]` or `[*in, out]` with heads and head dimension apart, as Flax has them.

    Returns:
      a nested dict with the keys of `shapes`, of `PartitionSpec`. Vectors (norms, biases) are whole
      on every device.

    Raises:
      InputError: the axis to divide does not divide by `parts`; names the weight.
    """
    outputs_next = True

    def spec_of(path: tuple[str, ...], array: Any) -> PartitionSpec:
        nonlocal outputs_next
        layers = int(stacked is not None and stacked in path[:-1])
        shape = tuple(array.shape)[layers:]
        if len(shape) < 2:
            return PartitionSpec()
        name = next((word for word in reversed(path) if word not in KERNELS), "")
        if name in TABLES:
            dimension = 0
        else:
            divides_outputs = name in OUTPUTS or (name not in INPUTS and outputs_next)
            outputs_next = not divides_outputs
            dimension = int(divides_outputs != outputs_first)
        if shape[dimension] % parts:
            raise InputError(
                f"{'.'.join(path)}: axis {layers + dimension} of size {shape[dimension]} does not "
                f"divide over {parts} devices (mesh axis {axis}); choose a number that divides it"
            )
        return PartitionSpec(*[None] * (layers + dimension), axis)

    def walk(tree: Shapes, above: tuple[str, ...]) -> dict[str, Any]:
        specs = {}
        for key, node in tree.items():
            # Keys may hold whole paths, as those of PyTorch's state dicts do.
            path = (*above, *re.split(r"[./]", str(key)))
            specs[key] = walk(node, path) if isinstance(node, Mapping) else spec_of(path, node)
        return specs

    return walk(shapes, ())
