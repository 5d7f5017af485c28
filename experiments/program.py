"""The shell of every program: flags, configuration, exit codes.

A program is written as

    FLAGS = program.new_flags(config=True)
    flags.DEFINE_string("workdir", "", "folder of the run", flag_values=FLAGS)

    def main(flags):
        from parscale import training  # jax and the like: only once the flags are known to be right

        config = program.load_config(flags)
        ...

    if __name__ == "__main__":
        program.run(main, FLAGS)

Nothing imported here imports jax: that keeps `--help` and refusals quick, and lets the allocator be
set before anything large is loaded.
"""

import importlib.util
import inspect
import os
import pathlib
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TypeVar

from absl import flags as absl_flags

from experiments import process
from parscale import config_io
from parscale.config import Config
from sharding import hosts
from sharding.mesh import MeshConfig
from sharding.settings import InputError, nearest

PRESETS = pathlib.Path(__file__).parent / "configs"
ORDERLY = (0, 130, 143)
"""Exit codes that `main` returns where all processes of a run end together."""

Made = TypeVar("Made")
Main = Callable[[absl_flags.FlagValues], int | None]


class FieldParser(absl_flags.ArgumentParser):
    """Reads the text of a configuration field's flag."""

    def __init__(self, kind: type):
        super().__init__()
        self.kind = kind

    def parse(self, argument):
        return config_io.parse(self.kind, argument) if isinstance(argument, str) else argument


def new_flags(config: bool = False, mesh: bool = False) -> absl_flags.FlagValues:
    """Flags of one program, apart from the process-wide ones, so that programs never clash.

    Args:
      config: whether the program takes `--config` and a flag for every field of `Config`.
      mesh: whether it takes those of the mesh alone; see `load_mesh`.
    """
    flags = absl_flags.FlagValues()
    if config:
        absl_flags.DEFINE_string("config", None, f"preset: {a_preset()}", flag_values=flags)
    for name, kind, field in config_io.leaves(Config):
        if not (config or (mesh and name.startswith("mesh."))):
            continue
        doc = field.metadata["doc"]
        if field.metadata["choices"]:
            doc += f" ({', '.join(map(str, field.metadata['choices']))})"
        if kind is bool:
            absl_flags.DEFINE_boolean(f"config.{name}", field.default, doc, flag_values=flags)
        else:
            absl_flags.DEFINE(
                FieldParser(kind), f"config.{name}", field.default, doc, flag_values=flags
            )
    return flags


def add_hosts_flags(flags: absl_flags.FlagValues) -> None:
    """Defines a flag for every field of `hosts.HostsConfig`, for a program that many hosts run."""
    for name, kind, field in config_io.leaves(hosts.HostsConfig):
        doc = field.metadata["doc"]
        absl_flags.DEFINE(FieldParser(kind), name, field.default, doc, flag_values=flags)


def load_hosts(flags: absl_flags.FlagValues) -> hosts.HostsConfig:
    """What `add_hosts_flags` made. Raises InputError for values that do not fit together."""
    names = [leaf.name for leaf in config_io.leaves(hosts.HostsConfig)]
    return hosts.HostsConfig(**{name: flags[name].value for name in names})


def presets(function: str = "get_config") -> list[str]:
    """Names of the files that come with the package and define a function."""
    files = PRESETS.glob("[!_]*.py")
    return sorted(path.stem for path in files if f"\ndef {function}(" in path.read_text())


def load_preset(name: str) -> Config:
    """The configuration of a preset, given by path, or by name if it comes with the package.

    Raises:
      InputError: no such preset, one without `get_config`, or one that does not validate.
    """
    config = call_preset(name, "get_config", Config)
    try:
        return config_io.from_dict(Config, config_io.to_dict(config))
    except InputError as error:
        raise InputError(f"--config={name}: {error}") from None


def call_preset(name: str, function: str, kind: type[Made]) -> Made:
    """What a function of a preset's file returns.

    Args:
      name: path of the file, or its name if it comes with the package.
      function: to call, without arguments.
      kind: what it returns.

    Raises:
      InputError: no such file, no such function, or it returns or raises what it should not.
    """
    path = pathlib.Path(name)
    if not path.is_file() and path.name == name and not path.suffix:
        path = PRESETS / f"{name}.py"
    if not path.is_file():
        guess = nearest(path.stem, presets(function))
        raise InputError(f"--config={name}: no such preset{guess}; expected {a_preset(function)}")
    if path.suffix != ".py":
        raise InputError(f"--config={name}: expected {a_preset(function)}")
    spec = importlib.util.spec_from_file_location(f"preset_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise InputError(f"it has no {function}(), which should return a {kind.__name__}")
        made = getattr(module, function)()
        if not isinstance(made, kind):
            raise InputError(
                f"{function}() returned {type(made).__name__}, expected a {kind.__name__}"
            )
        return made
    except SyntaxError as error:
        raise InputError(f"--config={name}: line {error.lineno}: {error.msg}") from None
    except InputError as error:
        raise InputError(f"--config={name}: {error}") from None


def a_preset(function: str = "get_config") -> str:
    """What `--config` expects, in words."""
    return f"a Python file with {function}(), or one of {', '.join(presets(function))}"


def changes(flags: absl_flags.FlagValues) -> dict[str, object]:
    """The fields that were given on the command line, by dotted name."""
    names = [leaf.name for leaf in config_io.leaves(Config) if f"config.{leaf.name}" in flags]
    given = {name: flags[f"config.{name}"] for name in names}
    return {name: flag.value for name, flag in given.items() if flag.present}


def load_mesh(flags: absl_flags.FlagValues) -> MeshConfig | None:
    """The mesh that the command line describes, or None if it says nothing: one device.

    Raises:
      InputError: the sizes are no mesh.
    """
    given = changes(flags)
    return config_io.replace(Config(), given).mesh if given else None


def load_config(flags: absl_flags.FlagValues, workdir: str = "") -> Config:
    """The preset of `--config`, else the configuration in `workdir`; then the fields given.

    Raises:
      InputError: neither is there, or the result does not validate.
    """
    saved = pathlib.Path(workdir) / "config.json"
    if flags.config is not None:
        config = load_preset(flags.config)
    elif workdir and saved.exists():
        config = config_io.from_json(Config, saved)
    else:
        raise InputError(f"--config is missing: expected {a_preset()}")
    return config_io.replace(config, changes(flags))


def default_workdir(flags: absl_flags.FlagValues) -> str:
    """`runs/<name of the preset>`, below the current folder.

    Raises:
      InputError: there is no preset to name it after.
    """
    if flags.config is None:
        raise InputError(f"--config is missing: expected {a_preset()}")
    return os.path.join("runs", pathlib.Path(flags.config).stem)


def fail(error: Exception) -> int:
    """Prints an error that needs no traceback, in one line. Returns the exit code for it."""
    print("error:", str(error).replace("\n", " "), file=sys.stderr)
    return 1


def usage(flags: absl_flags.FlagValues, doc: str) -> str:
    """What `--help` prints: the program's text, its flags, then the fields of the configuration."""
    own = sorted((n for n in flags if not n.startswith("config.")), key=lambda n: n != "config")
    lines = [inspect.cleandoc(doc), "", "Flags:"]
    for name in own:
        lines += _flag_help(flags[name])
    lines.append(f"{'  --help':<41}this text")
    fields = [name for name in flags if name.startswith("config.")]
    if fields:
        lines += ["", "Configuration fields, each with its value where nothing else is said:"]
    section = None
    for name in (f"config.{leaf.name}" for leaf in config_io.leaves(Config)):
        if name not in fields:
            continue
        if name.split(".")[1] != section:
            section = name.split(".")[1]
            lines += ["", f" {section}"]
        lines += _flag_help(flags[name])
    return "\n".join(lines)


def _flag_help(flag: absl_flags.Flag) -> list[str]:
    default = "..." if flag.default is None else flag.default
    if isinstance(default, list | tuple):
        default = ",".join(map(str, default))
    if isinstance(default, bool):
        default = str(default).lower()
    shown = f"  --{flag.name}={default}"
    text = textwrap.wrap(" ".join(flag.help.split()), 58) or [""]
    if len(shown) > 40:
        return [shown, *(" " * 41 + line for line in text)]
    return [f"{shown:<41}{text[0]}", *(" " * 41 + line for line in text[1:])]


def parse(flags: absl_flags.FlagValues, argv: Sequence[str]) -> None:
    """Sets `flags` from a command line, whose first word is the program's name.

    Raises:
      InputError: an unknown flag, a value of the wrong type, or a word that is not a flag.
    """
    flags.unparse_flags()
    for name in flags:
        flags[name].unparse()
    try:
        rest = flags(list(argv))[1:]
    except absl_flags.UnrecognizedFlagError as error:
        guess = config_io.nearest_name(error.flagname, list(flags))
        guess = guess.replace('"', '"--', 1)
        raise InputError(f"--{error.flagname}: no such flag{guess}; --help lists all") from None
    except absl_flags.Error as error:
        raise InputError(_flag_error(str(error))) from None
    if rest:
        raise InputError(f"{rest[0]}: not a flag; expected --name=value")


def _flag_error(message: str) -> str:
    """An absl message in the words of ours."""
    missing = re.match(r"flag --(\S+?)=None: Flag --\S+ must have a value", message)
    if missing:
        return f"--{missing[1]} is missing"
    message = re.sub(r"invalid literal for int\(\).*", "expected an integer", message)
    message = re.sub(r"could not convert string to float.*", "expected a number", message)
    message = re.sub(r"\('Non-boolean argument.*", "expected true or false", message)
    return message.removeprefix("flag ")


def run(main: Main, flags: absl_flags.FlagValues, argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a program and leaves the process with an honest exit code.

    0 finished; 2 bad input, told in one line; 130 or 143 interrupted; 1 anything else. What `main`
    returns is the exit code, None being 0. A program that began with `hosts.start` leaves the other
    processes here, or ends them where it failed.

    Args:
      main: the program, given its parsed flags; its docstring, or else its module's, is the text
        of `--help`.
      flags: what `new_flags` made, with the program's own flags defined on it.
      argv: the command line; that of the process if None, which may be restarted by
        `process.tune_allocator`.
    """
    if argv is None:
        process.tune_allocator()
        argv = sys.argv
    if {"--help", "-help", "-h"}.intersection(argv[1:]):
        _print_help(usage(flags, main.__doc__ or main.__globals__["__doc__"] or ""))
        sys.exit(0)
    reason, orderly = "", False
    try:
        parse(flags, argv)
        process.check_device_count()
        # Libraries that define flags of their own read them from here.
        if not absl_flags.FLAGS.is_parsed():
            absl_flags.FLAGS(argv[:1])
        code = main(flags) or 0
        orderly = code in ORDERLY
    except InputError as error:
        fail(error)
        reason, code = str(error), 2
    except KeyboardInterrupt:
        reason, code = "it was interrupted", 130
    except BrokenPipeError:
        process.leave_closed_pipe()
        code = 1
    except Exception as error:
        if refused := process.refused_platform():
            fail(refused)
            reason, code = str(refused), 2
        else:
            reason, code = f"{type(error).__name__}: {error}", 1
            traceback.print_exc()
    hosts.leave(code, reason, orderly)
    sys.exit(code)


def run_commands(commands: Mapping[str, tuple[Main, absl_flags.FlagValues]], doc: str) -> NoReturn:
    """Runs one of several commands of a program, named by its first word; see `run`.

    Args:
      commands: by name, the command and its flags.
      doc: what `--help` without a command prints, before the first line of each command.
    """
    process.tune_allocator()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in commands:
        run(*commands[name], [sys.argv[0], *sys.argv[2:]])
    if name in ("--help", "-help", "-h"):
        lines = [doc.strip(), "", "Commands, each with a --help of its own:"]
        for word, (main, _) in commands.items():
            lines.append(f"  {word:<10}{(main.__doc__ or '').strip().splitlines()[0]}")
        _print_help("\n".join(lines))
        sys.exit(0)
    given = f"{name}: no such command{nearest(name, list(commands))}" if name else "no command"
    fail(InputError(f"{given}; expected one of {', '.join(commands)}"))
    sys.exit(2)


def _print_help(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        process.leave_closed_pipe()
