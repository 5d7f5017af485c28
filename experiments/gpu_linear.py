"""What `experiments.bench` times of linear attention on an NVIDIA GPU: ours, and
flash-linear-attention's Triton kernels; for the mLSTM, which that has not, cuDNN's attention.

One row of 8192 tokens, bfloat16, head dimension 128. Runs are built as `experiments.timing.Worker`
expects them. The peer comes with `pip install flash-linear-attention`.
"""

import importlib
import importlib.util

from experiments.linear_workloads import RECURRENCES, inputs
from experiments.workloads import Runs, op_runs

HEADS = (16, 64)
LENGTH, HEAD_DIM = 8192, 128
PEERS = {
    "retention": ("fla.ops.simple_gla", "chunk_simple_gla"),
    "GLA": ("fla.ops.gla", "chunk_gla"),
    "DeltaNet": ("fla.ops.delta_rule", "chunk_delta_rule"),
    "gated DeltaNet": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "KDA": ("fla.ops.kda", "chunk_kda"),
}
"""Module and function for each recurrence; they take q, k, v and the gates, all [B, T, H, ...]."""


def has_peer() -> bool:
    """Whether flash-linear-attention is installed."""
    return importlib.util.find_spec("fla") is not None


def ours(
    recurrence: str, heads: int, length: int = LENGTH, implementation: str | None = "pallas_gpu"
) -> Runs:
    """`pallas_kernels.linear_attention`."""
    import jax.numpy as jnp

    from pallas_kernels import linear_attention

    arrays, gates = inputs(recurrence, 0, (1, length, heads, HEAD_DIM))

    def run(q, k, v, gates):
        normalize = recurrence == "mLSTM"
        return linear_attention(
            q, k, v, **gates, normalize=normalize, implementation=implementation
        )[0]

    arrays = [jnp.asarray(array, jnp.bfloat16) for array in arrays]
    return op_runs(run, [*arrays, {name: jnp.asarray(gate) for name, gate in gates.items()}])


def cudnn(heads: int, length: int = LENGTH, implementation: str | None = "cudnn") -> Runs:
    """`jax.nn.dot_product_attention`, causal, of the same q, k and v."""
    import jax
    import jax.numpy as jnp

    arrays, _ = inputs("mLSTM", 0, (1, length, heads, HEAD_DIM))

    def op(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    return op_runs(op, [jnp.asarray(array, jnp.bfloat16) for array in arrays])


def fla(recurrence: str, heads: int) -> Runs:
    """flash-linear-attention on the same arrays, gates float32."""
    import torch

    arrays, gates = inputs(recurrence, 0, (1, LENGTH, heads, HEAD_DIM))
    module, name = PEERS[recurrence]
    function = getattr(importlib.import_module(module), name)
    q, k, v = (torch.tensor(array, device="cuda", dtype=torch.bfloat16) for array in arrays)
    gates = [torch.tensor(gates[gate], device="cuda") for gate in ("log_decay", "beta")
             if gate in gates]  # fmt: skip
    arguments = [x.requires_grad_() for x in (q, k, v, *gates)]
    weight = torch.ones_like(v)

    def forward():
        with torch.inference_mode():
            function(*arguments)
        torch.cuda.synchronize()

    def both():
        out, _ = function(*arguments)
        torch.autograd.grad(out, arguments, weight)
        torch.cuda.synchronize()

    return {"forward": forward, "forward and backward": both}


def comparisons(peers: bool) -> list[tuple[str, str, dict, str]]:
    """Name, function, arguments and name of the peer of every line of the table."""
    lines = []
    for heads in HEADS:
        for recurrence in RECURRENCES:
            name, against = f"{recurrence}, {heads} heads", ""
            if recurrence not in PEERS:
                against = f"cuDNN attention, {heads} heads"
                lines.append((against, "cudnn", {"heads": heads}, ""))
            elif peers and has_peer():
                against = f"{name}, FLA"
                lines.append((against, "fla", {"recurrence": recurrence, "heads": heads}, ""))
            lines.append((name, "ours", {"recurrence": recurrence, "heads": heads}, against))
    return lines
