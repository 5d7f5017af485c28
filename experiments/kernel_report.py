"""What compilers say of the Pallas kernels, on a machine with neither a TPU nor a GPU.

    python -m experiments.kernel_report
    python -m experiments.kernel_report --what=tpu --length=8192 --head_dim=64

tpu   cycles by libtpu's own model, as microseconds beside the floors that products and memory set,
      for one head of causal attention in bfloat16; jax's splash attention beside ours. Estimates,
      not measurements: the last column says how each was made.
gpu   for an H200: registers of a thread, bytes spilled, wgmma instructions, bytes of shared memory.
      Needs `pip install -e '.[gpu]'`.
linear
      cycles as for tpu, of linear attention: 32 heads in bfloat16, with the default chunk; and of
      the mLSTM by the size of the chunk.

Each kernel is compiled in a process of its own.
"""

from absl import flags

from experiments import program, static_gpu, static_tpu, static_tpu_linear
from parscale.text import table
from sharding.settings import InputError

WHAT = ("tpu", "gpu", "linear")

FLAGS = program.new_flags()
flags.DEFINE_list("what", list(WHAT), f"any of {', '.join(WHAT)}", flag_values=FLAGS)
flags.DEFINE_integer("length", 4096, "positions of the TPU estimates [T]", flag_values=FLAGS)
flags.DEFINE_integer("head_dim", 128, "head dimension [h]", flag_values=FLAGS)
flags.DEFINE_list(
    "target", list(static_tpu.TARGETS), f"any of {', '.join(static_tpu.TARGETS)}",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_list("dtype", ["bfloat16"], "bfloat16, float16 or both, on the GPU", flag_values=FLAGS)


def tpu(options: flags.FlagValues) -> str:
    """The table of TPU estimates."""
    rows = static_tpu.table(options.length, options.head_dim, tuple(options.target))
    heads = ["kernel", "target", "tile", "us", "MXU floor", "HBM floor", "ratio", "how"]
    lines = [heads]
    for row in rows:
        figures = [
            "" if row[name] is None else f"{row[name]:.{digits}f}"
            for name, digits in (
                ("microseconds", 1), ("mxu_floor", 1), ("hbm_floor", 1), ("ratio", 2),
            )
        ]  # fmt: skip
        lines.append([row["kernel"], row["target"], row["tile"], *figures, row["how"]])
    title = f"TPU, by libtpu's estimate: 1 head, T {options.length}, h {options.head_dim}, causal"
    return f"{title}\n{table(lines, indent=2)}"


def linear(options: flags.FlagValues) -> str:
    """The tables of TPU estimates of linear attention."""
    T, h, targets = options.length, options.head_dim, tuple(options.target)
    texts = []
    for title, rows in (
        (f"32 heads, T {T}", static_tpu_linear.table(T, h, targets=targets)),
        ("the mLSTM by chunk, 32 heads, T 4096", static_tpu_linear.chunk_table(h, targets)),
    ):
        columns = {
            "cycles": 2, "microseconds": 0, "mxu_floor": 0, "hbm_floor": 0, "ratio": 2,
        }  # fmt: skip
        names = ["family", "kernel", "target", "chunk"]
        lines = [[*names, "cycles", "us", "MXU floor", "HBM floor", "ratio", ""]]
        for row in rows:
            figures = [
                "" if row[name] is None else f"{row[name]:.{digits}f}"
                for name, digits in columns.items()
            ]
            lines.append([*(str(row[name]) for name in names), *figures, row["why"]])
        title = f"TPU, by libtpu's estimate: linear attention, {title}, h {h}; cycles of a token"
        texts.append(f"{title}\n{table(lines, indent=2)}")
    return "\n\n".join(texts)


def gpu(options: flags.FlagValues) -> str:
    """The tables of what the GPU's compiler says."""
    texts = []
    for title, rows in (
        ("attention, causal packed documents, 48 prefix slots", static_gpu.rows),
        ("linear attention, packed documents, a learnable state", static_gpu.linear_rows),
    ):
        lines = [static_gpu.Row._fields, *rows([options.head_dim], options.dtype)]
        texts.append(f"NVIDIA H200, by its compiler: {title}\n{table(lines, indent=2)}")
    return "\n\n".join(texts)


def main(options: flags.FlagValues) -> None:
    known_dtypes = ("bfloat16", "float16")
    targets = tuple(static_tpu.TARGETS)
    for name, known in (("what", WHAT), ("target", targets), ("dtype", known_dtypes)):
        if not options[name].value or set(options[name].value) - set(known):
            raise InputError(
                f"--{name}={','.join(options[name].value)}: expected one or more of "
                f"{', '.join(known)}, with commas between"
            )
    if not 16 <= options.head_dim <= 256:
        raise InputError(f"--head_dim={options.head_dim}: expected 16 to 256")
    if options.length < 1024 or options.length % 1024:
        raise InputError(f"--length={options.length}: expected a multiple of 1024")
    for what in options.what:
        print({"tpu": tpu, "linear": linear, "gpu": gpu}[what](options), end="\n\n", flush=True)


if __name__ == "__main__":
    program.run(main, FLAGS)
