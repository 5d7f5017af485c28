"""Converts between Hugging Face directories and workdirs of ours, and adds streams to a model.

python -m experiments.convert --source=Qwen2.5-0.5B --target=/tmp/base
python -m experiments.convert --source=/tmp/base --target=/tmp/four --streams=4
python -m experiments.convert --source=/tmp/four --target=/tmp/hf --to=huggingface
"""

from absl import flags

from experiments import program
from sharding.settings import InputError

FLAGS = program.new_flags()
flags.DEFINE_string("source", "", "workdir, or Hugging Face directory", flag_values=FLAGS)
flags.DEFINE_string("target", "", "folder to write; must not exist or be empty", flag_values=FLAGS)
flags.DEFINE_enum("to", "workdir", ["workdir", "huggingface"], "what to write", flag_values=FLAGS)
flags.DEFINE_integer(
    "streams", None, "number of streams the target has; default: those of the source",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("seed", 0, "seed of new streams", 0, 2**32 - 1, flag_values=FLAGS)


def main(options: flags.FlagValues) -> int | None:
    for name in ("source", "target"):
        if not options[name].value:
            raise InputError(f"--{name} is missing")
    if options.streams is not None and options.streams < 1:
        raise InputError(f"--streams={options.streams}: expected at least 1")
    from parscale import checkpoints, conversion

    try:
        model = conversion.convert(
            options.source,
            options.target,
            to=options.to,
            streams=options.streams,
            seed=options.seed,
        )
    except (checkpoints.SaveError, OSError) as error:
        return program.fail(error)
    print(f"{options.target}: {options.to} with {model.streams} streams")
    return None


if __name__ == "__main__":
    program.run(main, FLAGS)
