"""The program that compiles for pods; most tests compile nothing."""

import csv
import dataclasses

import pytest
import runs

from experiments import compile_for_pod, program
from experiments.compile_for_pod import OUTPUT, TABLE
from parscale import pod_report, pod_search, pod_step
from parscale.chips import find_chip
from parscale.config import Config
from sharding.mesh import MeshConfig, mesh_shape
from sharding.pods.compilation import DoesNotFitError, Needs
from sharding.pods.hlo import Collective, Work
from sharding.pods.topologies import parse_topology
from sharding.settings import InputError

GiB = 2**30
PAPER = ("--config=paper_1b6", "--config.model.streams=4")


def a_step(config: Config, topology, decode=None) -> pod_step.PodStep:
    """A step as if compiled, whose times on v5e are 2 s, 1 s, 0.5 s and 0.25 s."""
    work = Work(
        flops=int(1.5 * 197e12),
        collectives=(
            Collective("all-gather", ("fsdp",), 2, 3, int(200e9)),
            Collective("host-transfer", (), 2, 1, int(3.125e9 / 4)),
        ),
        cycles=int(1.5e9),
        kernels=4,
        unknown_loops=(),
    )
    needs = Needs(int(819e9 / 2), int(819e9 / 2), 0, GiB, 2 * GiB, 1000, 3.0, work)
    return pod_step.PodStep(
        topology=topology, config=config, devices=topology.chips, chip=find_chip("v5e"),
        needs=needs, parameters=3 * GiB, optimizer=6 * GiB, cache=0, kernel_flops=0.5 * 197e12,
        model_flops=197e12,
    )  # fmt: skip


def pretend(monkeypatch, outcome):
    """Lets the program compile with `outcome(config, topology, decode)`, in this process."""

    def compiled(config, topology, decode, apart=False):
        try:
            return outcome(config, topology, decode)
        except (InputError, DoesNotFitError) as error:
            return error

    monkeypatch.setattr(compile_for_pod, "compiled", compiled)


def test_a_step_is_bounded_by_what_takes_longest():
    step = a_step(Config(), parse_topology("v5e:2x2"))
    assert step.seconds == pytest.approx({"compute": 2, "memory": 1, "ici": 0.5, "dcn": 0.25})
    assert step.bound == pytest.approx(2)
    assert step.mfu_bound == pytest.approx(0.5)
    assert step.compiler_seconds == pytest.approx(1)
    unpublished = dataclasses.replace(step, chip=find_chip("v4"))
    assert unpublished.seconds["dcn"] == float("inf")


def test_it_says_what_a_chip_needs(monkeypatch, capsys):
    pretend(monkeypatch, a_step)
    assert runs.call(compile_for_pod, *PAPER, "--topology=v5litepod-256") == 0
    out, _ = capsys.readouterr()
    for text in (
        "v5e:16x16: 256 chips", "2.000 of 16.000", "3.000", "6.000", "all-gather", "186.265",
        "compute 2000.00, ", "ici 500.00", "dcn 250.00", "at least 2000.00 ms", "3750.00 ms",
        "MFU: at most 50.0%", "295.500 TFLOP of products, 98.500 in kernels",
    ):  # fmt: skip
        assert text in out.replace("memory 1000.00, ", ""), text


def test_what_does_not_fit_is_told_with_code_1(monkeypatch, capsys):
    def outcome(*_):
        raise DoesNotFitError(20 * GiB, 15.75 * GiB)

    pretend(monkeypatch, outcome)
    assert runs.call(compile_for_pod, *PAPER, "--topology=v5e:16x16") == 1
    out, error = capsys.readouterr()
    assert not out
    assert error.count("\n") == 1
    assert "20.00 GiB on a chip, of which 15.75 GiB can be used" in error


def test_fit_finds_the_largest_batch(monkeypatch, capsys):
    tried = []

    def outcome(config, topology, decode):
        tried.append(config.data.batch)
        if config.data.batch > 11 * 64:
            raise DoesNotFitError(16 * GiB, 15.75 * GiB)
        return a_step(config, topology)

    pretend(monkeypatch, outcome)
    words = ("--topology=v5e:16x16", "--config.mesh.fsdp=64", "--config.mesh.stream=4", "--fit")
    assert runs.call(compile_for_pod, *PAPER, *words) == 0
    assert f"The largest that fits: --config.data.batch={11 * 64}\n" in capsys.readouterr().out
    assert len(tried) == len(set(tried)) <= 8


def test_fit_where_nothing_fits(monkeypatch, capsys):
    def outcome(*_):
        raise DoesNotFitError(16 * GiB, 15.75 * GiB)

    pretend(monkeypatch, outcome)
    assert runs.call(compile_for_pod, *PAPER, "--topology=v5e:16x16", "--fit") == 1
    assert "batch=256, one row for each part of the batch" in capsys.readouterr().err


def test_search_ranks_the_meshes_and_says_why_others_cannot_be(monkeypatch, capsys):
    def outcome(config, topology, decode):
        if config.mesh.fsdp == 16:
            raise DoesNotFitError(16 * GiB, 15.75 * GiB)
        step = a_step(config, topology)
        return dataclasses.replace(step, kernel_flops=config.mesh.fsdp * 1e12)

    pretend(monkeypatch, outcome)
    words = ("--topology=v5e:4x4", "--search=fsdp,stream,tensor")
    assert runs.call(compile_for_pod, *PAPER, *words) == 0
    out = capsys.readouterr().out
    assert "no   fsdp=16: the program does not fit" in out
    assert "no   stream=16: model.streams=4 does not divide over 16" in out
    assert "no   fsdp=4 x tensor=4: model.kv_heads=2 does not divide over 4" in out
    ranked = [line.split("  ")[0] for line in out.split("\n\n")[1].splitlines()[1:]]
    assert ranked == ["fsdp=2 x stream=4 x tensor=2", "fsdp=4 x stream=2 x tensor=2",
                      "fsdp=4 x stream=4", "fsdp=8 x tensor=2", "fsdp=8 x stream=2"]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "topology=: no such slice"),
        (("--topology=v5e-100",), "expected one of 1, 4, 8"),
        (("--topology=v5e-16", "--config.mesh.fsdp=3"), "takes 3 devices, but there are 16"),
        (("--topology=v5e-16", "--fit", "--search=fsdp"), "give one of them"),
        (("--topology=v5e-16", "--search=fdsp"), "expected some of data, fsdp"),
        (("--topology=v5e-16", "--rows=4"), "only --program=decode"),
        (("--topology=v5e-16", "--program=decode", "--cache=0"), "--cache=0"),
        (("--topology=v5e-16", "--program=serve"), "program"),
        (("--table",), "leave out --config"),
        (("--topology=v5e-16", "--only=v5e:16x16"), "only --table takes it"),
    ],
)
def test_bad_input_is_refused_in_a_line(capsys, words, told):
    assert told in runs.refusal(capsys, compile_for_pod, *PAPER, *words)


def test_a_table_that_cannot_be_written_is_refused_before_any_work(capsys):
    line = runs.refusal(capsys, compile_for_pod, "--table", "--output=nowhere/pod.csv")
    assert "--output=nowhere/pod.csv: No such file or directory" in line


def test_the_table_is_written_as_it_comes_and_mended_row_by_row(monkeypatch, capsys, tmp_path):
    path = tmp_path / "pod.csv"

    def table(*words):
        code = runs.call(compile_for_pod, "--table", f"--output={path}", *words)
        with path.open(newline="") as file:
            return code, [(row["topology"], row["peak_gib"]) for row in csv.DictReader(file)]

    def too_large(config, topology, decode):
        if topology.slices > 1:
            raise DoesNotFitError(None, None)
        return a_step(config, topology)

    def larger(config, topology, decode):
        step = a_step(config, topology)
        return dataclasses.replace(step, needs=dataclasses.replace(step.needs, peak=7 * GiB))

    names = [name for name, _ in TABLE]
    pretend(monkeypatch, too_large)
    assert table() == (1, [(name, "2.000") for name in names[:-1]])
    pretend(monkeypatch, larger)
    capsys.readouterr()
    mended = [(name, "7.000" if name in (names[1], names[-1]) else "2.000") for name in names]
    assert table(f"--only={names[-1]},{names[1]}") == (0, mended)
    assert capsys.readouterr().out.count("\n| ") == len(names) + 1
    assert "expected some of" in runs.refusal(capsys, compile_for_pod, "--table", "--only=v5e")


def test_bisection_finds_the_border():
    for border in range(12):
        tried = []

        def fits(number, border=border, tried=tried):
            tried.append(number)
            return number <= 3 * border

        found = pod_search.largest_that_fits(fits, 3)
        assert found == (3 * border or None, 3 * border + 3)
        assert len(tried) <= 8
    assert pod_search.largest_that_fits(lambda n: True, 1, 8) == (8, None)


def test_kernels_do_what_masks_leave():
    model = program.load_preset("paper_1b6").model
    assert pod_step.visible_pairs(model, "attention", 5) == 15
    with_prefix = dataclasses.replace(model, streams=2, transform_size=7)
    assert pod_step.visible_pairs(with_prefix, "attention", 5) == 15 + 35
    window = dataclasses.replace(model, window=3)
    seen = [min(position + 1, 3) for position in range(5)]
    assert pod_step.visible_pairs(window, "window", 5) == sum(seen)


def test_the_table_that_is_kept_is_of_these_pods_and_keeps_the_contract():
    with open(OUTPUT, newline="") as file:
        rows = list(csv.DictReader(file))
    names = [row["topology"] for row in rows]
    assert names
    assert names == [name for name, _ in TABLE if name in names]
    for row, name in zip(rows, names, strict=True):
        sizes = dict(TABLE)[name]
        mesh = MeshConfig(**{"data": 1, **sizes})
        mesh_shape(mesh, parse_topology(name).device_count)
        assert row["mesh"] == mesh.describe()
        assert 0 < float(row["peak_gib"]) < float(row["memory_gib"])
        # A row of activations, or less, for each part of the batch, and parts of the gradients.
        rows_of_a_part = int(row["batch"]) / (mesh.data * mesh.fsdp)
        assert 0 < float(row["stream_gib"]) < 0.1 * rows_of_a_part
        assert (float(row["dcn_gib"]) > 0) == name.startswith("2x")
    for line in pod_report.markdown(rows).splitlines():
        assert line.count("|") == len(pod_report.MARKDOWN) + 1


@pytest.mark.slow
@pytest.mark.tpu_compile
def test_the_first_pod_of_the_table_repeats(tmp_path, monkeypatch):
    """Takes a minute or two; within what another version of the compiler may change."""
    monkeypatch.setattr(compile_for_pod, "TABLE", TABLE[:1])
    path = tmp_path / "pod.csv"
    assert runs.call(compile_for_pod, "--table", f"--output={path}") == 0
    found, kept = (next(csv.DictReader(open(name))) for name in (path, OUTPUT))  # noqa: SIM115
    for name in ("topology", "mesh", "parameters_gib", "optimizer_gib", "kernel_tflop"):
        assert found[name] == kept[name]
    assert float(found["tflop"]) == pytest.approx(float(kept["tflop"]), rel=1e-3)
    for name in ("peak_gib", "fsdp_gib", "stream_gib"):
        assert float(found[name]) < 1.1 * float(kept[name])


@pytest.mark.slow
@pytest.mark.tpu_compile
def test_train_and_decode_are_compiled(capsys):
    words = ("--config=tiny", "--topology=v5e:2x2", "--config.mesh.fsdp=2", "--config.mesh.data=1",
             "--config.model.streams=2", "--config.mesh.stream=2", "--config.data.length=256",
             "--config.model.dtype=bfloat16")  # fmt: skip
    for flags in (("--program=train",), ("--program=decode", "--rows=8", "--cache=512")):
        step = pod_search.apart(run_program, words + flags)
        assert "On each chip" in step
        assert "MFU: at most" in step
        assert "unknown length" not in step


def run_program(words) -> str:
    """What the program prints, run in this process."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert runs.call(compile_for_pod, *words) == 0
    return out.getvalue()
