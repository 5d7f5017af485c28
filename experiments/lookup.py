"""A value looked up by its key in N documents that are read in a row, or each alone.

    python -m experiments.lookup
    python -m experiments.lookup --counts=1,4,16 --seeds=0,1,2 --csv=lookup.csv

A text is a tag, documents of a few pairs of a key and a value, a tag and a key; its value is to be
named. A model (two layers of width 64) learns from texts whose documents stand in a row, as many as
`--documents`. Then the documents are read in three ways: sequentially, as in training; parallel,
each alone behind the first tag and all at the same positions; and by APE (arXiv 2502.05431), which
adds to that a temperature and a scale of the attention to documents. These two are chosen for each
number of documents from a small grid, on texts of their own.

Prints a table: number of documents, way of reading, accuracy for each seed, chosen temperature and
scale, pairs of query and key before the answer. Naming any value of a text of N documents is right
about 1 / 4N of the time, 4 being `--pairs`. Ctrl-C and SIGTERM end with the table of what was
finished.
"""

import contextlib
import sys

from absl import flags

from experiments import process, program, tasks
from sharding.settings import InputError

ROPE_THETA = 1e5
COLUMNS = (
    "documents_read", "reading", "seed", "accuracy", "temperature", "scale", "visible_pairs",
    *tasks.ABOUT_RUN, "documents", "pairs", "keys", "values", *tasks.SIZES, "test_rows",
    "validation_rows", *tasks.ABOUT_PLACE,
)  # fmt: skip

FLAGS = program.new_flags()
tasks.define_flags(
    FLAGS, width=64, layers=2, heads=2, mlp_width=64, steps=1500, batch=8, learning_rate=5e-3
)
flags.DEFINE_list(
    "counts", ["1", "2", "4", "8", "16"], "how many documents are read", flag_values=FLAGS
)
flags.DEFINE_integer("documents", 8, "most documents in a text of training", flag_values=FLAGS)
flags.DEFINE_integer("pairs", 4, "pairs of a key and a value in a document", flag_values=FLAGS)
flags.DEFINE_integer("keys", 64, "keys in the vocabulary", flag_values=FLAGS)
flags.DEFINE_integer("values", 32, "values in the vocabulary", flag_values=FLAGS)
flags.DEFINE_integer("test_rows", 256, "texts of the test, for each number", flag_values=FLAGS)
flags.DEFINE_integer(
    "validation_rows", 128, "texts on which temperature and scale are chosen", flag_values=FLAGS
)


def main(options: flags.FlagValues) -> int | None:
    seeds = tasks.read_seeds(options.seeds)
    from parscale.lookup import Lookup

    task = Lookup(options.documents, options.pairs, options.keys, options.values)
    counts = _read_counts(options.counts, task)
    for name in ("test_rows", "validation_rows"):
        if options[name].value < 1:
            raise InputError(f"--{name}={options[name].value}: expected at least 1")
    longest = max(task.length, task.text_length(max(counts), task.pairs))
    configs = [
        tasks.make_config(
            options, task.vocab_size, task.length, seed,
            rope_theta=ROPE_THETA, max_length=longest,
        )
        for seed in seeds
    ]  # fmt: skip
    file = tasks.open_table(options.csv, COLUMNS) if options.csv else None
    found: dict[tuple, list] = {}
    with process.Interruption() as interruption, file or contextlib.nullcontext():
        for config in configs:
            if interruption.requested is not None:
                break
            print(f"seed {config.train.seed}", file=sys.stderr, flush=True)
            run = _train(task, config, interruption)
            if run is None:
                break
            for score in _evaluate(task, run, counts, options, config.train.seed):
                found.setdefault((score.documents, score.reading), []).append(score)
                print(
                    f"{score.documents} documents, {score.reading}: {score.accuracy:.2%}",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                if file:
                    own = score._asdict() | {"accuracy": f"{score.accuracy:.4f}"}
                    own["documents_read"] = own.pop("documents")
                    tasks.write_row(file, COLUMNS, options, config, run, **own)
                if interruption.requested is not None:
                    break
    return tasks.finish(_table(found, seeds), interruption)


def _read_counts(words: list[str], task) -> list[int]:
    most = task.keys // task.pairs
    if not words or not all(word.isdecimal() and 0 < int(word) <= most for word in words):
        raise InputError(
            f"--counts={','.join(words)}: expected numbers from 1 to {most}, separated by commas; "
            f"more documents of {task.pairs} keys each need more than keys={task.keys}"
        )
    return [int(word) for word in dict.fromkeys(words)]


def _train(task, config, interruption: process.Interruption):
    """A model that has learned from documents in a row, or None."""
    from parscale import lookup
    from parscale.tasks import lesson, train

    def draw(step: int, random):
        keys = lesson(task.documents * task.pairs, step, config.train.steps, random)
        return lookup.draw_rows(task, keys, config.data.batch, random)

    return train(config, draw, should_stop=lambda: interruption.requested is not None)


def _evaluate(task, run, counts: list[int], options: flags.FlagValues, seed: int):
    """Scores of each number of documents and way of reading, one after the other."""
    import numpy as np

    from parscale import lookup

    model, random = run.model(), np.random.default_rng([seed, 1])
    for count in counts:
        texts = [
            [lookup.draw(task, count, task.pairs, random) for _ in range(rows)]
            for rows in (options.validation_rows, options.test_rows)
        ]
        yield from lookup.compare(model, task, *texts)


def _table(found: dict, seeds: list[int]) -> str:
    from parscale.text import table

    rows = [
        ["documents", "reading", *(f"seed {seed}" for seed in seeds), "temperature, scale",
         "pairs of query and key"]
    ]  # fmt: skip
    for (documents, reading), scores in found.items():
        each = [f"{score.accuracy:.1%}" for score in scores] + ["-"] * (len(seeds) - len(scores))
        factors = "; ".join(f"{score.temperature:g}, {score.scale:g}" for score in scores)
        factors = factors if reading == "ape" else "-"
        rows.append([documents, reading, *each, factors, f"{scores[0].visible_pairs:,}"])
    return table(rows)


if __name__ == "__main__":
    program.run(main, FLAGS)
