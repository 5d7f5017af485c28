"""The shell of the programs, mostly from outside: a small program in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from absl import flags

from experiments import program
from experiments.process import ALLOCATOR, Interruption
from models.config import ModelConfig
from parscale import config_io
from parscale.config import Config
from sharding.settings import InputError

PROGRAM = '''"""Does as it is told.

python -m fake --config=tiny
"""

import json
import os
import sys
import time

from absl import flags

from experiments import process, program
from parscale import config_io
from sharding.settings import InputError

FLAGS = program.new_flags(config=True)
flags.DEFINE_enum("do", "show", ["show", "sleep", "loop", "crash", "refuse", "return", "exit",
                  "devices"], "what to do", flag_values=FLAGS)
flags.DEFINE_integer("steps", 5, "how often", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("workdir", None, "folder", required=True, flag_values=FLAGS)
flags.DEFINE_multi_string("prompt", [], "text", flag_values=FLAGS)


def main(flags):
    if flags.do == "show":
        shown = {"config": config_io.to_dict(program.load_config(flags, flags.workdir))}
        shown["prompts"] = flags.prompt
        shown["argv"] = sys.argv[1:]
        shown["pid"] = os.getpid()
        shown["tunables"] = os.environ.get("GLIBC_TUNABLES")
        shown["threads"] = os.environ.get("NPROC")
        shown["jax"] = "jax" in sys.modules
        print(json.dumps(shown))
    elif flags.do == "sleep":
        print("ready", flush=True)
        time.sleep(60)
    elif flags.do == "loop":
        with process.Interruption() as interruption:
            print("ready", flush=True)
            while not interruption.requested:
                time.sleep(0.01)
            print("saving", flush=True)
            time.sleep(0.01 if flags.steps == 1 else 60)
        return interruption.exit_code
    elif flags.do == "crash":
        raise RuntimeError("broken")
    elif flags.do == "refuse":
        raise InputError("first\\nsecond")
    elif flags.do == "devices":
        import jax

        jax.devices()
    elif flags.do == "return":
        return 7
    elif flags.do == "exit":
        raise SystemExit(9)


if __name__ == "__main__":
    program.run(main, FLAGS)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake")
    (folder / "fake.py").write_text(PROGRAM)
    (folder / "bare.py").write_text("x = 1\n")
    (folder / "broken.py").write_text("def get_config(:\n")
    (folder / "other.py").write_text("def get_config():\n    return {}\n")
    head = "from models.config import ModelConfig\nfrom parscale.config import Config\n"
    for name, arguments in [("odd", "width=10, heads=3"), ("typed", "width=128.0")]:
        body = f"def get_config():\n    return Config(model=ModelConfig({arguments}))\n"
        (folder / f"{name}.py").write_text(head + body)
    return folder


def start(folder, *arguments, **environment):
    """The fake program, started in `folder`; a variable that is None is not set for it."""
    environment = {**os.environ, "PARSCALE_KEEP_ALLOCATOR": "1"} | environment
    return subprocess.Popen(
        [sys.executable, "-m", "fake", f"--workdir={folder}", *arguments],
        cwd=folder,
        env={name: value for name, value in environment.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background may have SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def finish(process):
    """Exit code, standard output, standard error."""
    out, error = process.communicate(timeout=30)
    return process.returncode, out, error


def show(folder, *arguments, **environment):
    """What the fake program says of itself."""
    code, out, error = finish(start(folder, *arguments, **environment))
    assert code == 0, error
    return json.loads(out)


def refused(folder, *arguments, **environment):
    """The one line with which the arguments are refused."""
    code, out, error = finish(start(folder, *arguments, **environment))
    assert (code, out) == (2, ""), error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_help_lists_every_field_with_default_meaning_and_choices(folder):
    begin = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-m", "fake", "--help"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    seconds = time.monotonic() - begin
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.startswith("Does as it is told.")
    assert all(len(line) <= 100 for line in process.stdout.splitlines())
    words = " ".join(process.stdout.split())
    for name, _, field in config_io.leaves(Config):
        default = field.default
        shown = str(default).lower() if isinstance(default, bool) else default
        shown = ",".join(default) if isinstance(default, tuple) else shown
        assert f"--config.{name}={shown} {' '.join(field.metadata['doc'].split())}" in words
    assert "(dynamic, constant, mean)" in words
    assert "--steps=5 how often" in words
    assert "tiny" in words
    assert seconds < 2


def test_help_may_be_cut_short(folder):
    process = start(folder, "--help")
    process.stdout.close()
    code, error = process.wait(30), process.stderr.read()
    assert (code, error) == (0, "")


def test_fields_and_flags_reach_the_program(folder):
    shown = show(
        folder, "--config=tiny", "--config.model.streams=2", "--config.model.qkv_bias=false",
        "--noconfig.model.tied_embeddings", "--config.train.learning_rate=1",
        "--config.data.corpus=a, b=c", "--config.mesh.data=-1", "--prompt=x", "--prompt", "y z",
    )  # fmt: skip
    config = config_io.from_dict(Config, shown["config"])
    assert config.model.streams == 2
    assert not config.model.qkv_bias
    assert not config.model.tied_embeddings
    assert config.train.learning_rate == 1.0
    assert config.data.corpus == "a, b=c"
    assert config.mesh.data == -1
    assert config.model.layers == program.load_preset("tiny").model.layers
    assert shown["prompts"] == ["x", "y z"]
    assert not shown["jax"]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.model.stream=4", 'did you mean "--config.model.streams"'),
        ("--streams=4", 'did you mean "--config.model.streams"'),
        ("--step=4", 'did you mean "--steps"'),
        ("--confg=tiny", 'did you mean "--config"'),
        ("--config.model.streams=abc", "--config.model.streams=abc: expected an integer"),
        ("--config.model.qkv_bias=perhaps", "--config.model.qkv_bias=perhaps: expected true or"),
        ("--config.train.b1=x", "--config.train.b1=x: expected a finite number"),
        ("--steps=x", "--steps=x: expected an integer"),
        ("--steps=0", "--steps=0"),
        ("--do=shw", "--do=shw"),
        ("--config=timy", 'no such preset (did you mean "tiny"?)'),
        ("--config=nowhere/tiny.py", 'no such preset (did you mean "tiny"?)'),
        ("--config=bare.py", "--config=bare.py: it has no get_config()"),
        ("--config=broken.py", "--config=broken.py: line 1: "),
        ("--config=other.py", "--config=other.py: get_config() returned dict"),
        ("--config=odd.py", "--config=odd.py: width=10 is not divisible by heads=3"),
        ("--config=typed.py", "--config=typed.py: model.width=128.0: expected an integer"),
        ("--config.model.streams=0", "streams=0: expected at least 1"),
        ("--config.model.heads=3", "width=128 is not divisible by heads=3"),
        ("--config.model.transform=prefx", 'did you mean "prefix"'),
        ("tiny", "tiny: not a flag"),
        ("--config", "Missing value"),
    ],
)
def test_bad_input_is_one_line(argument, words, folder, monkeypatch, capsys):
    """In this process, with a program like the fake one, for speed; from outside below."""
    monkeypatch.chdir(folder)
    options = program.new_flags(config=True)
    flags.DEFINE_integer("steps", 5, "how often", lower_bound=1, flag_values=options)
    flags.DEFINE_enum("do", "show", ["show", "loop"], "what to do", flag_values=options)
    with pytest.raises(SystemExit) as exit:
        program.run(program.load_config, options, ["fake", "--config=tiny", argument])
    out, error = capsys.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


def test_bad_input_from_outside(folder):
    assert "model.streams" in refused(folder, "--config=tiny", "--config.model.stream=4")
    assert "did you mean" in refused(folder, "--config=timy")
    assert refused(folder, "--do=refuse") == "error: first second\n"
    assert "one of" in refused(folder)


def test_devices_that_are_not_there(folder):
    line = refused(folder, "--do=devices", JAX_PLATFORMS="nonsense")
    assert "JAX_PLATFORMS=nonsense: jax finds no such device here" in line
    for count in ("many", "0"):
        line = refused(folder, "--config=tiny", JAX_NUM_CPU_DEVICES=count)
        assert f"JAX_NUM_CPU_DEVICES={count}: expected a number of devices" in line


def test_missing_required_flag(capsys):
    options = program.new_flags()
    flags.DEFINE_string("workdir", None, "folder", required=True, flag_values=options)
    with pytest.raises(SystemExit) as exit:
        program.run(lambda flags: None, options, ["fake"])
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: --workdir is missing\n"


def test_configuration_of_a_workdir_serves_where_no_preset_is_given(folder, tmp_path):
    config_io.to_json(Config(model=ModelConfig(streams=3)), tmp_path / "config.json")
    shown = show(folder, f"--workdir={tmp_path}", "--config.train.steps=7")
    assert shown["config"]["model"]["streams"] == 3
    assert shown["config"]["train"]["steps"] == 7
    (tmp_path / "config.json").write_text("{")
    assert "config.json: not a configuration" in refused(folder, f"--workdir={tmp_path}")


def test_a_flag_that_repeats_a_default_still_counts():
    options = program.new_flags(config=True)
    program.parse(options, ["fake", "--config=tiny", "--config.model.streams=1"])
    assert program.load_preset("tiny").model.streams != 1
    assert program.load_config(options).model.streams == 1
    program.parse(options, ["fake", "--config=tiny"])
    assert program.load_config(options) == program.load_preset("tiny")


@pytest.mark.parametrize(("do", "code"), [("return", 7), ("exit", 9), ("crash", 1)])
def test_exit_codes(do, code, folder):
    returned, _, error = finish(start(folder, f"--do={do}"))
    assert returned == code
    assert ("Traceback" in error and "RuntimeError: broken" in error) == (do == "crash")


def test_ctrl_c_before_the_loop_is_quiet(folder):
    process = start(folder, "--do=sleep")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    code, _, error = finish(process)
    assert (code, error) == (130, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_loop_save(number, code, folder):
    process = start(folder, "--do=loop", "--steps=1")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    returned, out, error = finish(process)
    assert (returned, out, error) == (code, "saving\n", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_a_second_signal_does_not_wait(number, code, folder):
    process = start(folder, "--do=loop")
    for line in ("ready\n", "saving\n"):
        assert process.stdout.readline() == line
        process.send_signal(number)
    assert finish(process)[0] == code


def test_signals_of_two_kinds_keep_the_first():
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert interruption.exit_code == 143


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in Interruption.signals]
    with Interruption() as interruption:
        assert interruption.requested is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested == signal.SIGTERM
    assert interruption.exit_code == 143
    assert [signal.getsignal(number) for number in Interruption.signals] == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_allocator_restart_keeps_process_and_arguments(folder):
    arguments = ["--config=tiny", "--prompt=two words", "--prompt=$HOME \\ 'quoted'\n"]
    environment = {"JAX_PLATFORMS": "cpu", "PARSCALE_KEEP_ALLOCATOR": None}
    process = start(folder, *arguments, GLIBC_TUNABLES=None, **environment)
    shown = json.loads(finish(process)[1])
    assert shown["tunables"] == ALLOCATOR
    assert shown["argv"] == [f"--workdir={folder}", *arguments]
    assert shown["pid"] == process.pid


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
@pytest.mark.parametrize(
    ("environment", "tunables"),
    [
        ({"PARSCALE_KEEP_ALLOCATOR": "1"}, None),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, "glibc.malloc.arena_max=2"),
        ({"JAX_PLATFORMS": "cuda"}, None),
    ],
)
def test_allocator_is_left_alone(environment, tunables, folder):
    unset = {"PARSCALE_KEEP_ALLOCATOR": None, "GLIBC_TUNABLES": None, "JAX_PLATFORMS": "cpu"}
    assert show(folder, "--config=tiny", **unset | environment)["tunables"] == tunables


def test_fake_devices_get_a_thread_each(folder):
    assert show(folder, "--config=tiny", NPROC=None, JAX_NUM_CPU_DEVICES="8")["threads"] == "32"
    assert show(folder, "--config=tiny", NPROC=None, JAX_NUM_CPU_DEVICES=None)["threads"] is None


def test_default_workdir_is_named_after_the_preset():
    options = program.new_flags(config=True)
    program.parse(options, ["fake", "--config=experiments/configs/tiny.py"])
    assert program.default_workdir(options) == os.path.join("runs", "tiny")
    program.parse(options, ["fake"])
    with pytest.raises(InputError, match="--config is missing"):
        program.default_workdir(options)


def test_fail_tells_an_error_in_one_line(capsys):
    assert program.fail(RuntimeError("no space\nleft")) == 1
    assert capsys.readouterr().err == "error: no space left\n"
