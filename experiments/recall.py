"""Multi-query associative recall (MQAR): which mixers can look a value up by its key.

    python -m experiments.recall
    python -m experiments.recall --mixers=attention,delta_net,retention+attention --seeds=0,1,2

A row of 256 tokens shows 32 pairs of a key and a value, drawn from 128 keys and 64 values, and then
every pair three times more, in other orders; what counts is the share of the values that are
predicted when their keys come again. Naming any value of the row is right 3 % of the time. A model
has two layers of width 64 and two heads of 32; in recurrent mixers their keys have 64 dimensions.
It trains with AdamW and a cosine schedule on rows that begin easy: of documents of 1 pair, then 2,
4, ..., 32. The task is that of arXiv 2312.04927 with fewer keys and values.

Prints a table: mixer, accuracy of each seed and their mean, time of a run. Ctrl-C and SIGTERM end
with the table of what was finished.
"""

import contextlib
import csv
import sys

from absl import flags

from experiments import program
from sharding.settings import InputError

DEFAULT_MIXERS = ["attention", "retention", "gla", "mlstm_exp", "delta_net", "gated_delta_net"]
INIT_STD = 0.1
ROPE_THETA = 1e5
WEIGHT_DECAY = 0.01
WARMUP_STEPS = 100
COLUMNS = (
    "mixer", "seed", "accuracy", "loss", "seconds", "params", "length", "keys", "values", "width",
    "layers", "heads", "key_dim", "mlp_width", "steps", "batch", "learning_rate", "commit",
    "device", "jax",
)  # fmt: skip

FLAGS = program.new_flags()
flags.DEFINE_list(
    "mixers", DEFAULT_MIXERS,
    "mixers of all layers, by the names of --config.model.mixers of experiments.train; a+b takes "
    "turns", flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_list("seeds", ["0", "1"], "of the weights and the rows", flag_values=FLAGS)
flags.DEFINE_string("csv", "", "also write every run to this file", flag_values=FLAGS)
flags.DEFINE_integer(
    "length", 256, "tokens in a row [T]; an eighth as many pairs are remembered", flag_values=FLAGS
)
flags.DEFINE_integer("keys", 128, "keys in the vocabulary", flag_values=FLAGS)
flags.DEFINE_integer("values", 64, "values in the vocabulary", flag_values=FLAGS)
flags.DEFINE_integer("width", 64, "width of the residual stream [D]", flag_values=FLAGS)
flags.DEFINE_integer("layers", 2, "layers [L]", flag_values=FLAGS)
flags.DEFINE_integer("heads", 2, "heads of every mixer [H]", flag_values=FLAGS)
flags.DEFINE_integer(
    "key_dim", 64, "head dimension of a recurrent mixer's keys [hk]", flag_values=FLAGS
)
flags.DEFINE_integer("mlp_width", 64, "width of the hidden layer [F]", flag_values=FLAGS)
flags.DEFINE_integer("steps", 1000, "optimizer steps", flag_values=FLAGS)
flags.DEFINE_integer("batch", 8, "rows in a step [B]", flag_values=FLAGS)
flags.DEFINE_float("learning_rate", 5e-3, "peak learning rate of AdamW", flag_values=FLAGS)
flags.DEFINE_integer("test_rows", 128, "rows of the test, rounded to batches", flag_values=FLAGS)


def main(options: flags.FlagValues) -> int | None:
    from parscale.recall import Recall

    task = Recall(options.length, options.keys, options.values)
    seeds = _read_seeds(options.seeds)
    if not options.mixers:
        raise InputError("--mixers is empty: expected names separated by commas")
    if options.test_rows < options.batch:
        raise InputError(f"--test_rows={options.test_rows}: expected at least one batch")
    test_rows = options.test_rows // options.batch * options.batch
    configs = {
        name: [_config(options, task, name, seed) for seed in seeds] for name in options.mixers
    }
    file = _open(options.csv) if options.csv else None
    from parscale.recall import learn

    scores = {name: [] for name in options.mixers}
    with program.Interruption() as interruption, file or contextlib.nullcontext():
        runs = [(name, config) for name in options.mixers for config in configs[name]]
        for name, config in runs:
            print(f"{name}, seed {config.train.seed}", file=sys.stderr, flush=True)
            score = learn(
                task, config, test_rows, should_stop=lambda: interruption.requested is not None
            )
            if score is None:
                break
            print(f"accuracy {score.accuracy:.2%}", file=sys.stderr, flush=True)
            scores[name].append(score)
            if file:
                _write(file, name, options, config, score)
    print(_table(scores, seeds))
    return interruption.exit_code


def _config(options: flags.FlagValues, task, name: str, seed: int):
    """The run of one mixer, or several that take turns, and one seed."""
    from models.config import ModelConfig
    from parscale.config import Config, DataConfig, TrainConfig

    try:
        model = ModelConfig(
            vocab_size=task.vocab_size,
            width=options.width,
            layers=options.layers,
            mixers=tuple(name.split("+")),
            heads=options.heads,
            kv_heads=options.heads,
            key_dim=options.key_dim,
            mlp_width=options.mlp_width,
            init_std=INIT_STD,
            rope_theta=ROPE_THETA,
            max_length=task.length,
        )
        train = TrainConfig(
            steps=options.steps,
            learning_rate=options.learning_rate,
            warmup_steps=min(WARMUP_STEPS, options.steps),
            weight_decay=WEIGHT_DECAY,
            seed=seed,
            log_every=200,
        )
        return Config(model, data=DataConfig(length=task.length, batch=options.batch), train=train)
    except InputError as error:
        raise InputError(f"--mixers={name}: {error}") from None


def _read_seeds(words: list[str]) -> list[int]:
    if not words or not all(word.isdecimal() for word in words) or len({*words}) < len(words):
        raise InputError(
            f"--seeds={','.join(words)}: expected different whole numbers separated by commas"
        )
    return [int(word) for word in words]


def _open(path: str):
    """A new table of runs with its header."""
    try:
        file = open(path, "w", encoding="utf-8", newline="")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"--csv={path}: {error.strerror}") from None
    csv.writer(file).writerow(COLUMNS)
    return file


def _write(file, name: str, options: flags.FlagValues, config, score) -> None:
    """Adds a run to the table, where it stays if a later one fails."""
    import jax

    from parscale import flops, provenance

    row = {name: options[name].value for name in COLUMNS if name in options}
    row |= {
        "mixer": name,
        "seed": config.train.seed,
        "accuracy": f"{score.accuracy:.4f}",
        "loss": f"{score.loss:.4f}",
        "seconds": f"{score.seconds:.0f}",
        "params": flops.parameter_counts(config.model)["total"],
        "commit": provenance.commit(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    csv.DictWriter(file, COLUMNS).writerow(row)
    file.flush()


def _table(scores: dict, seeds: list[int]) -> str:
    from parscale.progress import format_seconds
    from parscale.text import table

    rows = [["mixer", *(f"seed {seed}" for seed in seeds), "mean", "time of a run"]]
    for name, found in scores.items():
        if not found:
            continue
        each = [f"{score.accuracy:.1%}" for score in found]
        each += ["-"] * (len(seeds) - len(found))
        mean = sum(score.accuracy for score in found) / len(found)
        seconds = sum(score.seconds for score in found) / len(found)
        rows.append([name, *each, f"{mean:.1%}", format_seconds(seconds)])
    return table(rows)


if __name__ == "__main__":
    program.run(main, FLAGS)
