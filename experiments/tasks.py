"""What the programs that train small models on drawn tasks have in common: flags, tables, runs."""

import csv
import sys
from collections.abc import Sequence
from typing import TextIO

from absl import flags

from experiments import process
from sharding.settings import InputError

INIT_STD = 0.1
WEIGHT_DECAY = 0.01
WARMUP_STEPS = 100
SIZES = ("width", "layers", "heads", "mlp_width", "steps", "batch", "learning_rate")
ABOUT_RUN = ("loss", "seconds", "params")
ABOUT_PLACE = ("commit", "device", "jax")


def define_flags(values: flags.FlagValues, **defaults) -> None:
    """Defines `--seeds`, `--csv` and those of SIZES, with these defaults of the last."""
    flags.DEFINE_list("seeds", ["0", "1"], "of the weights and the rows", flag_values=values)
    flags.DEFINE_string("csv", "", "also write every run to this file", flag_values=values)
    helps = {
        "width": "width of the residual stream [D]",
        "layers": "layers [L]",
        "heads": "heads of every mixer [H]",
        "mlp_width": "width of the hidden layer [F]",
        "steps": "optimizer steps",
        "batch": "rows in a step [B]",
    }
    for name, text in helps.items():
        flags.DEFINE_integer(name, defaults[name], text, flag_values=values)
    flags.DEFINE_float(
        "learning_rate", defaults["learning_rate"], "peak learning rate of AdamW",
        flag_values=values,
    )  # fmt: skip


def read_seeds(words: Sequence[str]) -> list[int]:
    """The numbers of `--seeds`.

    Raises:
      InputError: none, one twice, or what is no whole number.
    """
    if not words or not all(word.isdecimal() for word in words) or len({*words}) < len(words):
        raise InputError(
            f"--seeds={','.join(words)}: expected different whole numbers separated by commas"
        )
    return [int(word) for word in words]


def make_config(options: flags.FlagValues, vocab_size: int, length: int, seed: int, **model):
    """A run of the sizes that the flags say.

    Args:
      options: of the command line.
      vocab_size: of the task [V].
      length: of its rows [T].
      seed: of the weights and the rows.
      model: other fields of the model's configuration.

    Raises:
      InputError: sizes that do not go together.
    """
    from models.config import ModelConfig
    from parscale.config import Config, DataConfig, TrainConfig

    shape = ModelConfig(
        vocab_size=vocab_size,
        width=options.width,
        layers=options.layers,
        heads=options.heads,
        kv_heads=options.heads,
        mlp_width=options.mlp_width,
        init_std=INIT_STD,
        **{"max_length": length} | model,
    )
    train = TrainConfig(
        steps=options.steps,
        learning_rate=options.learning_rate,
        warmup_steps=min(WARMUP_STEPS, options.steps),
        weight_decay=WEIGHT_DECAY,
        seed=seed,
        log_every=200,
    )
    return Config(shape, data=DataConfig(length=length, batch=options.batch), train=train)


def open_table(path: str, columns: Sequence[str]) -> TextIO:
    """A new table of runs with its header.

    Raises:
      InputError: the file cannot be written.
    """
    try:
        file = open(path, "w", encoding="utf-8", newline="")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"--csv={path}: {error.strerror}") from None
    csv.writer(file).writerow(columns)
    return file


def write_row(
    file: TextIO, columns: Sequence[str], options: flags.FlagValues, config, run, **own
) -> None:
    """Adds a row to a table, where it stays if a later run fails.

    Args:
      file: the table.
      columns: of it: ABOUT_RUN, ABOUT_PLACE, "seed", names of flags, and those of `own`.
      options: of the command line.
      config: the run.
      run: what has its `loss` and `seconds`.
      own: other values.
    """
    import jax

    from parscale import flops, provenance

    row = {name: options[name].value for name in columns if name in options}
    row |= {
        "seed": config.train.seed,
        "loss": f"{run.loss:.4f}",
        "seconds": f"{run.seconds:.0f}",
        "params": flops.parameter_counts(config.model)["total"],
        "commit": provenance.commit(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    csv.DictWriter(file, columns).writerow(row | own)
    file.flush()


def finish(table: str, interruption: process.Interruption) -> int:
    """Prints a program's table, and that it was interrupted, if so; gives the exit code."""
    print(table, flush=True)
    if interruption.requested is not None:
        print("interrupted: the table is of what was finished", file=sys.stderr)
    return interruption.exit_code
