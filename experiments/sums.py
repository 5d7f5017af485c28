"""Sums of four lists, written one after the other, or beside each other and then joined.

    python -m experiments.sums
    python -m experiments.sums --seeds=0,1,2 --digits=8 --csv=sums.csv

A prompt shows four lists of digits. The text adds each up in a path of its own, then all four sums
in a conclusion, which ends with the answer. In sequential form paths stand one after the other; in
fork form they are written side by side, all from the position after the prompt and not seeing each
other, and the conclusion sees all of them and stands after the longest (Multiverse, arXiv
2506.09991). The tokens are the same, and so are the model (two layers of width 64) and the steps.

Three models are trained for each seed: on the sequential form, on the fork form, and on the fork
form with flat positions (each path stands after the one before). Those of the fork form also write
with positions that they have not learned: flat ones, and a conclusion after as many positions as it
sees tokens (concatenated). The generation engine lets models write everything but the tags that
begin paths and the conclusion.

Prints a table: what was learned, how it was written, accuracy of the answer for each seed, tokens
generated, those on the longest chain, their ratio, time of training. Naming any digit is right 20 %
of the time. Ctrl-C and SIGTERM end with the table of what was finished.
"""

import contextlib
import itertools
import sys

from absl import flags

from experiments import process, program, tasks
from sharding.settings import InputError

ROPE_THETA = 100.0
POSITIONS = {
    "one": {}, "shared": {}, "flat": {"branch": "flat"}, "concatenated": {"join": "concatenated"},
}  # fmt: skip
"""What of `models.segments.Rules` the positions of the table are; a plain text has one way."""
WRITTEN = {
    ("sequential", "one"): ("one",),
    ("fork", "shared"): ("shared", "flat", "concatenated"),
    ("fork", "flat"): ("flat", "shared"),
}
"""For each form and positions that are learned, the positions it is written with."""
COLUMNS = (
    "form", "learned", "written", "seed", "accuracy", "generated", "longest", *tasks.ABOUT_RUN,
    "lists", "digits", "base", *tasks.SIZES, "test_rows", *tasks.ABOUT_PLACE,
)  # fmt: skip

FLAGS = program.new_flags()
tasks.define_flags(
    FLAGS, width=64, layers=2, heads=4, mlp_width=128, steps=800, batch=16, learning_rate=5e-3
)
flags.DEFINE_integer("lists", 4, "lists in a prompt", flag_values=FLAGS)
flags.DEFINE_integer("digits", 5, "digits in a list", flag_values=FLAGS)
flags.DEFINE_integer("base", 5, "sums are modulo this", flag_values=FLAGS)
flags.DEFINE_integer("test_rows", 256, "prompts of the test", flag_values=FLAGS)


def main(options: flags.FlagValues) -> int | None:
    seeds = tasks.read_seeds(options.seeds)
    if options.test_rows < 1:
        raise InputError(f"--test_rows={options.test_rows}: expected at least 1")
    from parscale.sums import Sums

    task = Sums(options.lists, options.digits, options.base)
    configs = [
        tasks.make_config(
            options, task.vocab_size, task.length, seed,
            rope_theta=ROPE_THETA, max_length=2 * task.length,
        )
        for seed in seeds
    ]  # fmt: skip
    file = tasks.open_table(options.csv, COLUMNS) if options.csv else None
    found: dict[tuple, list] = {}
    with process.Interruption() as interruption, file or contextlib.nullcontext():
        for config, learned in itertools.product(configs, WRITTEN):
            if interruption.requested is not None:
                break
            seed = config.train.seed
            print(f"{' '.join(learned)}, seed {seed}", file=sys.stderr, flush=True)
            run = _train(task, config, learned, interruption)
            if run is None:
                break
            for written in WRITTEN[learned]:
                score = _write(task, run, learned[0], written, options.test_rows, seed)
                found.setdefault((*learned, written), []).append((score, run.seconds))
                text = f"written {written}: accuracy {score.accuracy:.2%}"
                print(text, file=sys.stderr, flush=True)
                if file:
                    own = dict(zip(COLUMNS, (*learned, written), strict=False))
                    own |= score._asdict() | {"accuracy": f"{score.accuracy:.4f}"}
                    tasks.write_row(file, COLUMNS, options, config, run, **own)
                if interruption.requested is not None:
                    break
    return tasks.finish(_table(found, seeds), interruption)


def _train(task, config, learned: tuple[str, str], interruption: process.Interruption):
    """A model that has learned a form with some positions, or None."""
    from models.segments import Rules
    from parscale import sums
    from parscale.tasks import train

    form, positions = learned
    rules = Rules(**POSITIONS[positions])

    def draw(step: int, random):
        return sums.to_rows(task, sums.draw(task, config.data.batch, random), form, rules)

    return train(config, draw, should_stop=lambda: interruption.requested is not None)


def _write(task, run, form: str, positions: str, rows: int, seed: int):
    """How a model does on prompts that are the same for all forms."""
    import numpy as np

    from models.segments import Rules
    from parscale import sums

    lists = sums.draw(task, rows, np.random.default_rng([seed, 1]))
    rules = Rules(**POSITIONS[positions])
    return sums.evaluate(run.model(), task, lists, form, rules)


def _table(found: dict, seeds: list[int]) -> str:
    from parscale.progress import format_seconds
    from parscale.text import table

    rows = [
        ["form", "learned positions", "written", *(f"seed {seed}" for seed in seeds), "tokens",
         "longest chain", "ratio", "training"]
    ]  # fmt: skip
    for names, results in found.items():
        scores = [score for score, _ in results]
        each = [f"{score.accuracy:.1%}" for score in scores] + ["-"] * (len(seeds) - len(scores))
        tokens, longest, seconds = (
            sum(values) / len(results)
            for values in (
                [score.generated for score in scores],
                [score.longest for score in scores],
                [seconds for _, seconds in results],
            )
        )
        rows.append(
            [*names, *each, f"{tokens:.0f}", f"{longest:.0f}",
             f"{tokens / longest:.2f}", format_seconds(seconds)]
        )  # fmt: skip
    return table(rows)


if __name__ == "__main__":
    program.run(main, FLAGS)
