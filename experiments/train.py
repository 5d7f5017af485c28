"""Trains a parallel-scaling language model, or goes on with a run that was interrupted.

    python -m experiments.train --config=experiments/configs/tiny.py --workdir=/tmp/tiny

The same command again goes on from the last complete checkpoint. Ctrl-C and SIGTERM save first.
On many hosts, the same command on each of them; where no cluster is detected, with --coordinator,
--num_processes and --process_id. The workdir is on storage that all of them share.
"""

import signal
import sys

from absl import flags

from experiments import process, program
from sharding import hosts
from sharding.settings import InputError

FLAGS = program.new_flags(config=True)
program.add_hosts_flags(FLAGS)
flags.DEFINE_string(
    "workdir", "", "folder of the run; default: runs/<name of the preset>", flag_values=FLAGS
)
flags.DEFINE_boolean(
    "grow_streams", False, "go on with more streams than the run has", flag_values=FLAGS
)
flags.DEFINE_list(
    "profile_steps", [], "first and last step of a profiler trace, as 10,12", flag_values=FLAGS
)


def read_profile_steps(words: list[str]) -> tuple[int, int] | None:
    """The pair of steps that --profile_steps names. Raises InputError for anything else."""
    if not words:
        return None
    try:
        first, last = map(int, words)
    except ValueError:
        first, last = 0, 0
    if not 1 <= first <= last:
        raise InputError(f"--profile_steps={','.join(words)}: expected two steps, as 10,12")
    return first, last


def main(options: flags.FlagValues) -> int | None:
    workdir = options.workdir or program.default_workdir(options)
    config = program.load_config(options, workdir)
    profile_steps = read_profile_steps(options.profile_steps)
    several = hosts.start(program.load_hosts(options))
    from parscale import checkpoints, run

    # With several processes, JAX's preemption service takes SIGTERM, and tells the others.
    signals = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    with process.Interruption(*signals) as interruption:
        try:
            result = run.train(
                config,
                workdir,
                grow_streams=options.grow_streams,
                profile_steps=profile_steps,
                should_stop=lambda: interruption.requested is not None,
            )
        except (run.DivergedError, checkpoints.SaveError) as error:
            return program.fail(error)
        except OSError as error:
            return program.fail(OSError(f"{workdir}: {error}; complete checkpoints are kept"))
    if result is None:
        run.print_once("interrupted and saved; the same command goes on from here", sys.stderr)
        return interruption.exit_code or 128 + signal.SIGTERM
    return None


if __name__ == "__main__":
    program.run(main, FLAGS)
