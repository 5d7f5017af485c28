"""Which runs `experiments.bench` compares, and the tables it prints of them."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments import gpu_attention, gpu_linear, linear_workloads, process, timing
from experiments.workloads import Shape

MEASURES = ("train", "decode", "attention", "masks", "linear", "gpu", "gpu_linear")
ALLOCATORS = ("tuned", "default")
# The sides of a comparison share the memory of one GPU.
GPU_ENVIRONMENT = {
    "GLIBC_TUNABLES": None,
    "JAX_PLATFORMS": None,
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


class Row(NamedTuple):
    """A line of a table.

    Attributes:
      name: what is run.
      call, arguments, run: where it comes from, as for `timing.Worker`.
      against: name of the row that it is compared with.
      tokens: how many it yields.
      flops: model operations it takes.
      share: of the work of the row that it is compared with.
    """

    name: str
    call: str
    arguments: dict[str, Any]
    run: str
    against: str = ""
    tokens: int = 0
    flops: int = 0
    share: float = 0.0


class Table(NamedTuple):
    """Rows measured in turn, what they do, and what differs between them.

    Attributes:
      platform: "cpu", whose workloads are told the `Shape`, or "gpu".
    """

    title: str
    note: str
    rows: list[Row]
    platform: str = "cpu"


def tables(shape: Shape, measures: list[str], peers: bool) -> list[Table]:
    """What is measured.

    Args:
      shape: a `workloads.Shape`.
      measures: some of `MEASURES`.
      peers: whether PyTorch takes part.
    """
    make = {
        "train": _train_table,
        "decode": _decode_table,
        "attention": _attention_table,
        "masks": _masks_table,
        "linear": _linear_table,
        "gpu": _gpu_table,
        "gpu_linear": _gpu_linear_table,
    }
    return [make[name](shape, peers) for name in MEASURES if name in measures]


def _train_table(shape: Shape, peers: bool) -> Table:
    from parscale import flops

    peer = f"PyTorch, batch {shape.rows}"
    rows = []
    for streams in dict.fromkeys((shape.streams, 1)):
        batch = shape.rows // streams
        rows.append(
            Row(
                f"ours, batch {batch}" + (f" x P {streams}" if streams > 1 else ", P 1"),
                "experiments.workloads:train",
                {"streams": streams},
                "step",
                peer,
                batch * shape.length,
                flops.train_flops(shape.model(streams), shape.length, batch),
            )
        )
    if peers:
        plain = rows[-1]
        rows.append(Row(peer, "experiments.peers:train", {}, "step", "", plain.tokens, plain.flops))
    note = (
        f"{shape.rows} rows of {shape.length} tokens through the layers in every line; PyTorch is "
        "transformers' Qwen2ForCausalLM (eager, SDPA, fused AdamW). P 1 is the same model; P "
        f"{shape.streams} adds the prefix slots and the aggregation. tokens/s counts text."
    )
    return Table("training step, float32, AdamW, clipping", note, rows)


def _decode_table(shape: Shape, peers: bool) -> Table:
    pairs = [(c, p) for p in dict.fromkeys((1, shape.streams)) for c in shape.decode_rows]
    rows = [
        Row(
            f"ours, batch {count}, P {streams}",
            "experiments.workloads:decode",
            {"streams": streams, "rows": count},
            "generate",
            f"PyTorch, batch {count * streams}",
            count * shape.tokens,
        )
        for count, streams in pairs
    ]
    if peers:
        rows += [
            Row(f"PyTorch, batch {through}", "experiments.peers:decode", {"rows": through},
                "generate", "", through * shape.tokens)
            for through in dict.fromkeys(count * streams for count, streams in pairs)
        ]  # fmt: skip
    note = (
        f"prompt of {shape.prompt}, {shape.tokens} new tokens a row, prefill included; PyTorch is "
        f"the plain model by transformers' generate. P {shape.streams} is compared with the batch "
        "that sends as many rows through the layers."
    )
    return Table("greedy decoding, float32", note, rows)


def _attention_table(shape: Shape, peers: bool) -> Table:
    sources = [("ours", "experiments.workloads:attention")]
    if peers:
        sources.append(("PyTorch SDPA", "experiments.peers:attention"))
    sources.append(("jax.nn.dot_product_attention", "experiments.workloads:jax_attention"))
    rows = [
        Row(f"{name}, {run}", call, {}, run, "" if name == against else f"{against}, {run}")
        for run in ("forward", "forward and backward")
        for against in ("PyTorch SDPA",)
        for name, call in sources
    ]
    note = (
        f"[{shape.rows}, {shape.length}, {shape.heads} heads, {shape.kv_heads} KV, "
        f"{shape.model(1).head_dim}] float32, each in its library's own layout."
    )
    return Table("causal attention", note, rows)


def _masks_table(shape: Shape, peers: bool) -> Table:
    """Of the XLA form; its own dense attention is the peer."""
    del peers
    from pallas_kernels.flash.xla_layout import BLOCK
    from pallas_kernels.masks.blocks import live_fraction
    from pallas_kernels.masks.examples import EXAMPLES, example

    length = shape.mask_length

    def share(name):
        return live_fraction(example(name, 1, length), length, length, BLOCK)

    call = "experiments.workloads:masked_attention"
    rows = [
        Row(name, call, {"kinds": list(EXAMPLES)}, name, "full", share=share(name))
        for name in EXAMPLES
    ]
    note = (
        f"[1, {length}, {shape.heads} heads, {shape.kv_heads} KV, {shape.model(1).head_dim}] "
        f"float32, forward and backward, beside our own attention without a mask. live: share of "
        f"the blocks of {BLOCK} x {BLOCK} that are visited; per live: ratio of the "
        "median times over it, 1 where a block costs what it costs without a mask."
    )
    return Table("attention under masks", note, rows)


def _linear_table(shape: Shape, peers: bool) -> Table:
    """Of the XLA form in chunks; the recurrence, and itself at another length, are the peers."""
    del shape, peers
    both, first = "forward and backward", linear_workloads.LENGTHS[0]
    rows = []

    def add(name, recurrence, length, implementation, against, share=0.0):
        arguments = {"recurrence": recurrence, "length": length, "implementation": implementation}
        call = "experiments.linear_workloads:linear_attention"
        rows.append(Row(name, call, arguments, both, against, length, 0, share))

    for name in linear_workloads.RECURRENCES:
        scan = f"{name}, token by token"
        add(f"{name}, in chunks", name, first, "xla", scan)
        add(scan, name, first, "oracle", "")
    for name in linear_workloads.RECURRENCES:
        for length in linear_workloads.LENGTHS[1:]:
            against = f"{name}, in chunks"
            add(f"{against}, T {length}", name, length, "xla", against, length / first)
    note = (
        f"[1, {first}, {linear_workloads.HEADS} heads, {linear_workloads.HEAD_DIM}] float32, "
        "forward and backward, in chunks of 64 beside the scan over tokens; then longer rows "
        "beside the first. live: tokens over those of the peer; per live: ratio of the median "
        "times over it, 1 where time is linear in the length."
    )
    return Table("linear attention", note, rows)


def _gpu_table(shape: Shape, peers: bool) -> Table:
    """Causal attention beside cuDNN; masks beside our own without one, and FlexAttention."""
    del shape
    title = "attention on a GPU"
    if not gpu_attention.has_gpu():
        return Table(title, "not measured: this machine has no NVIDIA GPU", [], "gpu")
    rows = []

    def add(name, call, arguments, run, against, pairs, share=0.0):
        work = gpu_attention.flops(arguments["length"], run, pairs)
        call = f"experiments.gpu_attention:{call}"
        rows.append(Row(f"{name}, {run}", call, arguments, run, against, 0, work, share))

    for run in gpu_attention.PASSES:
        for length in gpu_attention.LENGTHS:
            pairs, name = length * (length + 1) / 2, f"causal, T {length}"
            peer = f"{name}, cuDNN"
            add(peer, "cudnn", {"length": length}, run, "", pairs)
            arguments = {"length": length, "kind": "causal"}
            add(name, "ours", arguments, run, f"{peer}, {run}", pairs)
        length = gpu_attention.MASK_LENGTH
        full = f"full, T {length}"
        add(full, "ours", {"length": length, "kind": "full"}, run, "", length**2)
        for kind in gpu_attention.KINDS:
            pairs, arguments = gpu_attention.visible_pairs(kind, length), {"length": length}
            arguments["kind"] = kind
            share = pairs / length**2
            add(kind, "ours", arguments, run, f"{full}, {run}", pairs, share)
            if peers:
                add(
                    f"{kind}, FlexAttention", "flex", arguments, run, f"{full}, {run}", pairs, share
                )
    note = (
        "bfloat16, 16 heads, 2 KV, head dimension 128, 16384 tokens or one sequence. Causal "
        "attention is compared with cuDNN (jax.nn.dot_product_attention), a mask with our own "
        "attention without one. live: share of visible pairs; per live: ratio over it; TFLOP/s "
        "count visible pairs."
    )
    return Table(title, note, rows, "gpu")


def _gpu_linear_table(shape: Shape, peers: bool) -> Table:
    """Beside flash-linear-attention; the mLSTM beside cuDNN's attention."""
    del shape
    title = "linear attention on a GPU"
    if not gpu_attention.has_gpu():
        return Table(title, "not measured: this machine has no NVIDIA GPU", [], "gpu")
    rows = [
        Row(f"{name}, {run}", f"experiments.gpu_linear:{call}", arguments, run,
            against and f"{against}, {run}", gpu_linear.LENGTH)
        for run in gpu_attention.PASSES
        for name, call, arguments, against in gpu_linear.comparisons(peers)
    ]  # fmt: skip
    note = (
        f"[1, {gpu_linear.LENGTH}, heads, {gpu_linear.HEAD_DIM}] bfloat16. FLA is "
        "flash-linear-attention (Triton); the mLSTM is compared with causal cuDNN attention of "
        "the same arrays (jax.nn.dot_product_attention)."
    )
    return Table(title, note, rows, "gpu")


def measure(
    table: Table, shape: Shape, allocators: list[str], threads: int, options
) -> dict[str, Any]:
    """Times of the rows by name; with two allocators, a second set of rows for the other."""
    workers, runs, rows = {}, {}, {}
    try:
        for allocator in allocators:
            mark = "" if allocator == allocators[0] else f" ({allocator} allocator)"
            for row in table.rows:
                key = (allocator, row.call, str(row.arguments))
                if key not in workers:
                    report(f"starting {row.name}{mark}")
                    arguments, variables = row.arguments, GPU_ENVIRONMENT
                    if table.platform == "cpu":
                        arguments = {"shape": dataclasses.asdict(shape), **arguments}
                        variables = environment(allocator, threads)
                    workers[key] = timing.Worker(row.call, arguments, variables)
                name = row.name + mark
                runs[name] = (workers[key], row.run)
                rows[name] = row._replace(against=row.against and row.against + mark)
        timings = timing.interleave(runs, options.rounds, options.seconds, options.quiet, report)
    finally:
        for worker in workers.values():
            worker.close()
        report("")
    return {name: (rows[name], timings[name]) for name in rows}


def environment(allocator: str, threads: int) -> dict[str, str | None]:
    """Variables of a worker: CPU only, so many threads, this allocator."""
    tuned = process.ALLOCATOR if allocator == "tuned" else None
    return {
        "GLIBC_TUNABLES": tuned,
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "NPROC": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
    }


def describe(table: Table, measured: Mapping[str, Any], quiet: float) -> str:
    """The table as text."""
    if not measured:
        return f"{table.title}\n{table.note}"
    width = max(map(len, measured)) + 2
    heads = ["min ms", "median ms", "min/peer", "median/peer", "tokens/s", "TFLOP/s", "others"]
    has_share = any(row.share for row, _ in measured.values())
    if has_share:
        heads[4:5] = ["live", "per live"]
    lines = [table.title, f"{'':{width}}" + "".join(f"{head:>12}" for head in heads)]
    loud = False
    for name, (row, times) in measured.items():
        cells = [f"{times.least * 1e3:.1f}", f"{times.median * 1e3:.1f}"]
        peer = measured.get(row.against)
        cells += [f"{ratio:.2f}" for ratio in ratios(times, peer[1])] if peer else ["", ""]
        if has_share and row.share:
            ratio = ratios(times, peer[1])[1]
            cells += [
                f"{row.share:.1%}" if row.share <= 1 else f"{row.share:.0f}",
                f"{ratio / row.share:.2f}",
            ]
        elif has_share:
            cells += ["", ""]
        else:
            cells.append(f"{row.tokens / times.median:,.0f}" if row.tokens else "")
        cells.append(f"{row.flops / times.median / 1e12:.3f}" if row.flops else "")
        cells.append("?" if times.others is None else f"{times.others:.0%}")
        loud |= (times.others or 0) > quiet
        lines.append(f"{name:{width}}" + "".join(f"{cell:>12}" for cell in cells))
    lines.append(table.note)
    if loud:
        lines.append(
            f"Other processes took more than {quiet:.0%} of the processor time (column others): "
            "trust the ratios less, and the times not at all."
        )
    return "\n".join(lines)


def ratios(ours, peer) -> tuple[float, float]:
    """Our least time over the peer's least, and our median over the peer's median."""
    return ours.least / peer.least, ours.median / peer.median


def report(text: str) -> None:
    """Shows what is being done, on a terminal; the empty text clears it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
