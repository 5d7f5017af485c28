"""The report of kernels, with cycles that are given: the estimates themselves take minutes."""

import pytest

from experiments import kernel_report, program, static_gpu, static_tpu, static_tpu_linear


def run(*arguments):
    with pytest.raises(SystemExit) as exit_:
        program.run(kernel_report.main, kernel_report.FLAGS, ["kernel_report", *arguments])
    return exit_.value.code


def cycles(step):
    if step.kernel == "splash":
        raise RuntimeError("no estimate: because")
    return {"full": 1000.0, "partial": 1500.0, "whole": 1200.0}[step.kind]


def test_the_time_of_a_kernel_is_put_together_from_its_steps(monkeypatch):
    """T 2048 in tiles of 1024: 1 full and 2 partial ones, 2 rows of results."""
    monkeypatch.setattr(static_tpu, "cycles_of", cycles)
    monkeypatch.setattr("pallas_kernels.flash.tpu.FORWARD_TILES", {2: (1024, 1024)})
    forward, *_ = static_tpu.table(2048, 128, ("v5e",))
    assert forward["cycles"] == 1000 + 2 * 1500 + 2 * 200
    assert forward["microseconds"] == pytest.approx(4400 / 1.5e3)
    assert forward["mxu_floor"] == pytest.approx(2 * 2 * 128 * 2048 * 2049 / 2 / 197e12 * 1e6)
    assert forward["hbm_floor"] == pytest.approx(4 * 2 * 2048 * 128 / 819e9 * 1e6)
    assert forward["ratio"] == pytest.approx(forward["microseconds"] / forward["mxu_floor"])


def test_what_cannot_be_estimated_says_why(monkeypatch, capsys):
    monkeypatch.setattr(static_tpu, "cycles_of", cycles)
    assert run("--what=tpu", "--target=v6e", "--length=2048") == 0
    *_, last = capsys.readouterr().out.rstrip().splitlines()
    assert last.split()[:2] == ["splash", "v6e"]
    assert "no estimate: because" in last


def test_linear_attention_and_the_mlstm_by_chunk(monkeypatch, capsys):
    def cycles(step):
        if step.family == "kda":
            raise RuntimeError("no estimate: because")
        return 5.0

    monkeypatch.setattr(static_tpu_linear, "cycles_of", cycles)
    assert run("--what=linear", "--target=v5e") == 0
    lines = capsys.readouterr().out.splitlines()
    words = [line.split() for line in lines]
    # 32 heads of 4096 tokens at 1.5 GHz.
    assert ["retention", "forward", "v5e", "256", "5.00", "437"] in [line[:6] for line in words]
    assert sum("no estimate: because" in line for line in lines) == 2
    chunks = [line[3] for line in words if line[:3] == ["mlstm", "backward", "v5e"]]
    assert chunks == ["256", "64", "128", "256", "512"]


def test_without_the_plugin_the_gpu_report_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(static_gpu, "installed", lambda: False)
    assert run("--what=gpu") == 2
    assert "pip install -e '.[gpu]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--what=cpu", "--what=cpu: expected one or more of tpu, gpu"),
        ("--target=v4", "--target=v4: expected one or more of v5e, v6e"),
        ("--head_dim=0", "--head_dim=0: expected 16 to 256"),
        ("--dtype=float32", "--dtype=float32: expected one or more of bfloat16, float16"),
        ("--length=1000", "--length=1000: expected a multiple of 1024"),
    ],
)
def test_refusals_are_one_line(capsys, argument, message):
    assert run(argument) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
