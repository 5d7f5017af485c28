"""One HTML page of a run or a sweep, to read offline: losses, law, streams, cost.

python -m experiments.report --workdir=/tmp/tiny
python -m experiments.report --workdir=/tmp/law --output=law.html --chip=v5e
"""

import os
from pathlib import Path

from absl import flags

from experiments import program
from sharding.settings import InputError

FLAGS = program.new_flags()
flags.DEFINE_string("workdir", "", "workdir of a run, or folder of a sweep", flag_values=FLAGS)
flags.DEFINE_string("output", "", "the page; default: <workdir>/report.html", flag_values=FLAGS)
flags.DEFINE_string("chip", "H100", "for the cost of decoding", flag_values=FLAGS)


def main(options: flags.FlagValues) -> None:
    if not options.workdir:
        raise InputError("--workdir is missing: expected a run, or the folder of a sweep")
    if not os.path.isdir(options.workdir):
        raise InputError(f"--workdir={options.workdir}: no such folder")
    output = Path(options.output or Path(options.workdir) / "report.html")
    if not output.parent.is_dir():
        raise InputError(f"--output={output}: {output.parent}: no such folder")
    from parscale import cost, page, report

    chip = cost.find_chip(options.chip)
    name = os.path.basename(os.path.abspath(options.workdir))
    sections = report.sections(options.workdir, chip)
    text = page.page(f"parscale: {name}", os.path.abspath(options.workdir), sections)
    partial = output.with_suffix(".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, output)
    except OSError as error:
        raise InputError(f"--output={output}: {error.strerror}") from None
    print(output)


if __name__ == "__main__":
    program.run(main, FLAGS)
