import itertools
import json

import pytest

from experiments import (
    bench,
    comparisons,
    gpu_attention,
    gpu_linear,
    linear_workloads,
    program,
    timing,
    workloads,
)

TINY = workloads.Shape(
    width=16, layers=1, heads=2, kv_heads=1, mlp_width=16, vocab_size=32, streams=2, rows=2,
    length=8, decode_rows=(2,), prompt=3, tokens=4,
)  # fmt: skip
SIZES = {field: getattr(TINY, field) for field in TINY.__dataclass_fields__}
FLAGS = [f"--{field}={size}" for field, size in SIZES.items() if field != "decode_rows"]
FLAGS.append("--decode_rows=2")


def run(*arguments):
    with pytest.raises(SystemExit) as exit_:
        program.run(bench.main, bench.FLAGS, ["bench", *arguments])
    return exit_.value.code


def row(name, against=""):
    return comparisons.Row(name, "", {}, "", against, tokens=100, flops=10**12)


def test_a_table_gives_times_and_ratios():
    measured = {
        "ours": (row("ours", "peer"), timing.Timings([0.5, 0.9, 0.4], 0.0)),
        "peer": (row("peer"), timing.Timings([1.0, 2.0, 0.8], 0.02)),
    }
    table = comparisons.Table("a title", "a note", [])
    lines = comparisons.describe(table, measured, quiet=0.1).splitlines()
    assert lines[2].split() == ["ours", "400.0", "500.0", "0.50", "0.50", "200", "2.000", "0%"]
    assert lines[3].split() == ["peer", "800.0", "1000.0", "100", "1.000", "2%"]
    assert lines[4:] == ["a note"]
    assert "Other processes" in comparisons.describe(table, measured, quiet=0.01)


class Fake:
    """A worker whose turns are given; it notes who was asked."""

    def __init__(self, turns, asked):
        self.turns, self.asked = iter(turns), asked

    def time(self, run, seconds):
        self.asked.append(run)
        return next(self.turns)


def test_runs_take_turns_and_loud_turns_are_repeated(monkeypatch):
    monkeypatch.setattr(timing, "SETTLE", 0.0)
    asked = []
    a = Fake([timing.Timings([s], others) for s, others in ((1.0, 0), (9.0, 0.5), (3.0, 0))], asked)
    b = Fake([timing.Timings([s], 0.05) for s in (4.0, 5.0, 6.0)], asked)
    times = timing.interleave({"a": (a, "x"), "b": (b, "y")}, rounds=2, seconds=0, quiet=0.1)
    assert asked == ["x", "y"] * 3
    assert times["a"].seconds == [1.0, 3.0]
    assert (times["b"].least, times["b"].median) == (4.0, 5.0)


def test_a_machine_that_is_never_quiet_gives_its_quietest_turns(monkeypatch):
    monkeypatch.setattr(timing, "SETTLE", 0.0)
    worker = Fake([timing.Timings([float(i)], 0.9 - 0.1 * i) for i in range(3)], [])
    times = timing.interleave({"a": (worker, "x")}, rounds=1, seconds=0, quiet=0.1)
    assert times["a"].seconds == [2.0]
    assert times["a"].others == pytest.approx(0.7)


def test_a_run_is_repeated_for_as_long_as_asked(monkeypatch):
    now = itertools.count(0.0, 0.25)  # a reading of the clock takes as long
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    assert timing.measure(lambda: next(now), seconds=3).seconds == [0.5] * 3
    assert timing.measure(lambda: next(now), seconds=0).seconds == [0.5]


@pytest.mark.slow
def test_our_side_runs():
    # Among the parts is the whole training step.
    runs = [workloads.parts(SIZES, TINY.streams), workloads.decode(SIZES, streams=1, rows=2)]
    runs += [workloads.attention(SIZES), workloads.jax_attention(SIZES)]
    runs += [workloads.masked_attention(SIZES | {"mask_length": 24}, ["full", "packed"])]
    for work in (work for named in runs for work in named.values()):
        work()


@pytest.mark.parametrize(
    "recurrence",
    [
        name if name == "mLSTM" else pytest.param(name, marks=pytest.mark.slow)
        for name in linear_workloads.RECURRENCES
    ],
)
def test_linear_attention_runs(recurrence):
    for form in ("xla", "oracle"):
        runs = linear_workloads.linear_attention({}, recurrence, 70, form)
        runs["forward and backward"]()


def test_the_side_of_a_gpu_runs_on_a_cpu(monkeypatch):
    monkeypatch.setattr(gpu_attention, "rows_of", lambda length: 1)
    gpu_attention.ours(64, "fork_join", implementation=None)["forward"]()
    gpu_attention.cudnn(64, implementation="xla")["forward and backward"]()
    gpu_linear.ours("gated DeltaNet", 1, length=64, implementation=None)["forward"]()
    gpu_linear.cudnn(1, length=64, implementation="xla")["forward"]()


def test_the_peer_side_runs():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from experiments import peers

    for runs in (peers.train(SIZES), peers.decode(SIZES, rows=2), peers.attention(SIZES)):
        for work in runs.values():
            work()


def test_flex_attention_sees_what_our_mask_lets_through():
    torch = pytest.importorskip("torch")
    from torch.nn.attention import flex_attention

    seen = []

    def spy(q, k, v, block_mask, enable_gqa):
        mask = flex_attention.create_mask(block_mask.mask_mod, None, None, 64, 64, device="cpu")
        seen.append(int(torch.sum(mask)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "flex_attention", spy)
        for kind in ("causal", "fork_join", "packed"):
            gpu_attention.flex(64, kind, device="cpu")["forward"]()
    assert seen == [
        gpu_attention.visible_pairs(kind, 64) for kind in ("causal", "fork_join", "packed")
    ]
    assert seen[0] == 64 * 65 / 2


def test_tables_name_the_rows_that_they_compare(monkeypatch):
    monkeypatch.setattr(gpu_attention, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu_attention, "visible_pairs", lambda kind, length: 100)
    monkeypatch.setattr(gpu_linear, "has_peer", lambda: True)
    shape = workloads.Shape(mask_length=64)
    for table in comparisons.tables(shape, list(comparisons.MEASURES), peers=True):
        names = [row.name for row in table.rows]
        assert len(set(names)) == len(names) > 0
        assert {row.against for row in table.rows} <= {"", *names}


def test_without_a_gpu_its_table_says_so(monkeypatch):
    monkeypatch.setattr(gpu_attention, "has_gpu", lambda: False)
    for table in comparisons.tables(TINY, ["gpu", "gpu_linear"], peers=True):
        assert "not measured" in comparisons.describe(table, {}, 0.1)


def test_a_share_of_the_work_is_set_against_the_time():
    times = {
        name: timing.Timings([seconds], 0.0) for name, seconds in (("all", 2.0), ("half", 1.5))
    }
    half = comparisons.Row("half", "", {}, "", "all", share=0.5)
    measured = {"all": (row("all"), times["all"]), "half": (half, times["half"])}
    line = comparisons.describe(comparisons.Table("", "", []), measured, 0.1).splitlines()[3]
    assert line.split() == ["half", "1500.0", "1500.0", "0.75", "0.75", "50.0%", "1.50", "0%"]


def test_the_program(tmp_path, capsys):
    file = tmp_path / "figures.json"
    options = ["--what=attention", "--rounds=1", "--seconds=0", "--quiet=1", f"--json={file}"]
    assert run(*FLAGS, *options, "--peers=false") == 0
    printed = capsys.readouterr().out
    assert "causal attention" in printed
    assert "allocator: tuned" in printed
    figures = json.loads(file.read_text())["figures"]["causal attention"]
    assert {name.split(",")[0] for name in figures} == {"ours", "jax.nn.dot_product_attention"}
    assert all(times["seconds"][0] > 0 for times in figures.values())


def test_a_failing_worker_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)workloads:nothing failed.*no attribute 'nothing'"):
        timing.Worker("experiments.workloads:nothing", {}, {})


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--what=trian", "--what=trian: expected one or more of train, decode, attention"),
        ("--allocator=", "--allocator=: expected one or more of tuned, default"),
        ("--rounds=0", "--rounds=0"),
        ("--threads=0", "--threads=0"),
        ("--quiet=2", "--quiet=2"),
        ("--json=nowhere/x.json", "--json=nowhere/x.json: No such file or directory"),
        ("--heads=3", "width=16 is not divisible by heads=3"),
        ("--rows=0", "rows=0: expected at least 1"),
        ("--rows=3", "rows=3 does not divide by streams=2"),
    ],
)
def test_refusals_are_one_line(capsys, argument, message):
    assert run(*FLAGS, argument) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
