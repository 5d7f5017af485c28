"""A pod's step as text: for people, and as a row of a table."""

import importlib.metadata

from parscale.pod_step import PodStep
from parscale.text import table
from sharding.mesh import AXES

GiB = 2**30


def describe(step: PodStep) -> str:
    """All that is known of a step, on lines of a terminal."""
    needs, work, seconds = step.needs, step.needs.work, step.seconds
    per = "chip" if step.devices == step.topology.chips else "device (half a chip)"
    memory = [["memory", "GiB"], ["parameters", gib(step.parameters)]]
    if step.optimizer:
        memory.append(["optimizer", gib(step.optimizer)])
    if step.cache:
        memory.append(["cache", gib(step.cache)])
    memory += [
        ["activations and temporaries", gib(needs.temporaries)],
        ["peak", f"{gib(needs.peak)} of {gib(step.chip.memory)}"],
        ["program", gib(needs.code)],
    ]
    lines = [
        f"{step.topology}: {step.topology.chips} chips, mesh {step.config.mesh.describe()}; "
        f"compiled in {needs.seconds:.0f} s",
        f"\nOn each {per}:\n",
        table(memory),
    ]
    if work.unknown_loops:
        lines.append(f"\nLoops of unknown length, counted once: {', '.join(work.unknown_loops)}")
    moved = [["collectives", "over", "devices", "number", "GiB of results"]]
    moved += [
        [one.kind, "slices" if one.is_dcn else " x ".join(one.axes), one.size, one.count,
         gib(one.bytes)]
        for one in work.collectives
    ]  # fmt: skip
    lines += [
        "",
        f"operations: {work.flops / 1e12:.3f} TFLOP of products, "
        f"{step.kernel_flops / 1e12:.3f} in kernels (by formula), of which the model needs "
        f"{step.model_flops / 1e12:.3f}",
        "",
        table(moved),
        "",
        "least time, ms: "
        + ", ".join(f"{name} {1e3 * time:.2f}" for name, time in seconds.items() if time),
        f"step: at least {1e3 * step.bound:.2f} ms if all of that overlaps, "
        f"{1e3 * sum(seconds.values()):.2f} ms if nothing does",
        f"MFU: at most {step.mfu_bound:.1%}",
    ]
    estimate = step.compiler_seconds
    if estimate is not None:
        lines.append(
            f"the compiler's estimate of all but kernels and communication: {1e3 * estimate:.2f} ms"
        )
    return "\n".join(lines)


def row(step: PodStep) -> dict[str, str | int]:
    """A step as a row of `pod.csv`: GiB and seconds on each device, GiB over each mesh axis.

    What goes over two axes together is counted for both.
    """
    needs, work, seconds = step.needs, step.needs.work, step.seconds
    config = step.config
    found = {
        "topology": str(step.topology),
        "chips": step.topology.chips,
        "mesh": config.mesh.describe(),
        "streams": config.model.streams,
        "batch": config.data.batch,
        "length": config.data.length,
        "parameters_gib": gib(step.parameters),
        "optimizer_gib": gib(step.optimizer),
        "temporaries_gib": gib(needs.temporaries),
        "peak_gib": gib(needs.peak),
        "memory_gib": gib(step.chip.memory),
        "tflop": f"{(work.flops + step.kernel_flops) / 1e12:.3f}",
        "kernel_tflop": f"{step.kernel_flops / 1e12:.3f}",
        "model_tflop": f"{step.model_flops / 1e12:.3f}",
    }
    for axis in AXES:
        found[f"{axis}_gib"] = gib(work.bytes_over(axis))
    dcn = sum(one.bytes for one in work.collectives if one.is_dcn)
    found["dcn_gib"] = gib(dcn)
    for name in ("compute", "memory", "ici", "dcn"):
        found[f"{name}_s"] = f"{seconds[name]:.4f}"
    estimate = step.compiler_seconds
    return found | {
        "bound_s": f"{step.bound:.4f}",
        "mfu_bound": f"{step.mfu_bound:.3f}",
        "compiler_s": f"{estimate:.4f}" if estimate is not None else "",
        "compile_s": f"{needs.seconds:.0f}",
        "jax": importlib.metadata.version("jax"),
        "libtpu": importlib.metadata.version("libtpu"),
    }


MARKDOWN = {
    "slices": "topology",
    "chips": "chips",
    "mesh": "mesh",
    "peak, GiB": "peak_gib",
    "of": "memory_gib",
    "TFLOP": "tflop",
    "fsdp, GiB": "fsdp_gib",
    "stream, GiB": "stream_gib",
    "DCN, GiB": "dcn_gib",
    "step at least, ms": "bound_s",
    "MFU at most": "mfu_bound",
    "compiler's estimate, ms": "compiler_s",
}
"""Columns of the table for people, and where each comes from."""


def markdown(rows: list[dict]) -> str:
    """The main columns of such rows as a table in Markdown."""

    def cell(row: dict, source: str) -> str:
        value = row[source]
        if source in ("bound_s", "compiler_s"):
            return f"{1e3 * float(value):.1f}" if value else ""
        if source == "mfu_bound":
            return f"{float(value):.0%}"
        return str(value)

    lines = [list(MARKDOWN), ["---"] * len(MARKDOWN)]
    lines += [[cell(row, source) for source in MARKDOWN.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gib(size: float) -> str:
    """Bytes in GiB, to a thousandth."""
    return f"{size / GiB:.3f}"
