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
import sys

from absl import flags

from experiments import process, program, tasks
from sharding.settings import InputError

DEFAULT_MIXERS = ["attention", "retention", "gla", "mlstm_exp", "delta_net", "gated_delta_net"]
ROPE_THETA = 1e5
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
tasks.define_flags(
    FLAGS, width=64, layers=2, heads=2, mlp_width=64, steps=1000, batch=8, learning_rate=5e-3
)
flags.DEFINE_integer(
    "length", 256, "tokens in a row [T]; an eighth as many pairs are remembered", flag_values=FLAGS
)
flags.DEFINE_integer("keys", 128, "keys in the vocabulary", flag_values=FLAGS)
flags.DEFINE_integer("values", 64, "values in the vocabulary", flag_values=FLAGS)
flags.DEFINE_integer(
    "key_dim", 64, "head dimension of a recurrent mixer's keys [hk]", flag_values=FLAGS
)
flags.DEFINE_integer("test_rows", 128, "rows of the test, rounded to batches", flag_values=FLAGS)


def main(options: flags.FlagValues) -> int | None:
    from parscale.recall import Recall

    task = Recall(options.length, options.keys, options.values)
    seeds = tasks.read_seeds(options.seeds)
    if not options.mixers:
        raise InputError("--mixers is empty: expected names separated by commas")
    if options.test_rows < options.batch:
        raise InputError(f"--test_rows={options.test_rows}: expected at least one batch")
    test_rows = options.test_rows // options.batch * options.batch
    configs = {
        name: [_config(options, task, name, seed) for seed in seeds] for name in options.mixers
    }
    file = tasks.open_table(options.csv, COLUMNS) if options.csv else None
    from parscale.recall import learn

    scores = {name: [] for name in options.mixers}
    with process.Interruption() as interruption, file or contextlib.nullcontext():
        runs = [(name, config) for name in options.mixers for config in configs[name]]
        for name, config in runs:
            if interruption.requested is not None:
                break
            print(f"{name}, seed {config.train.seed}", file=sys.stderr, flush=True)
            score = learn(
                task, config, test_rows, should_stop=lambda: interruption.requested is not None
            )
            if score is None:
                break
            print(f"accuracy {score.accuracy:.2%}", file=sys.stderr, flush=True)
            scores[name].append(score)
            if file:
                own = {"mixer": name, "accuracy": f"{score.accuracy:.4f}"}
                tasks.write_row(file, COLUMNS, options, config, score, **own)
    return tasks.finish(_table(scores, seeds), interruption)


def _config(options: flags.FlagValues, task, name: str, seed: int):
    """The run of one mixer, or several that take turns, and one seed."""
    model = {
        "mixers": tuple(name.split("+")), "key_dim": options.key_dim, "rope_theta": ROPE_THETA,
    }  # fmt: skip
    return tasks.make_config(options, task.vocab_size, task.length, seed, **model)


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
