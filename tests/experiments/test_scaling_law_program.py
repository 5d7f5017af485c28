import json
import re
import sys
import types
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import runs

from experiments import program, scaling_law
from parscale.law_forms import Law

LAW = Law(1.5, 2e5, 0.4, (0.3,))


def command(name):
    """One of the program's commands as a program of its own."""
    main, flags = scaling_law.COMMANDS[name]
    return types.SimpleNamespace(__name__=name, main=main, FLAGS=flags)


def printed(capfd, name, *words):
    capfd.readouterr()
    code = runs.call(command(name), *words)
    out, error = capfd.readouterr()
    assert (code, error) == (0, "")
    return out


def refusal(capfd, name, *words):
    return runs.refusal(capfd, command(name), *words)


def write(path, params=(1e5, 2e5, 4e5), streams=(1, 2, 4), seeds=(0, 1), noise=1e-3):
    """A table of runs that follow `LAW`, each seed with a shift of its own."""
    rng = np.random.default_rng(0)
    rows = ["corpus,params,streams,loss,seed"]
    for seed in seeds:
        shift = rng.normal(0, 5 * noise)
        for N in params:
            for P in streams:
                loss = LAW.loss(N, P) + shift + rng.normal(0, noise)
                rows.append(f"texts,{N},{P},{loss:.6f},{seed}")
    path.write_text("\n".join(rows))
    return path


def picture(path):
    content = path.read_bytes()
    if path.suffix == ".svg":
        return " ".join(ElementTree.fromstring(content).itertext())
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return None


def test_the_published_law(tmp_path, capfd):
    files = tmp_path / "law.svg", tmp_path / "law.json"
    words = ["--bootstrap=40", f"--figure={files[0]}", f"--json={files[1]}"]
    out = printed(capfd, "fit", "--data=published", *words)
    figures = json.loads(files[1].read_text())
    stack, pile = out.split("\npile\n")
    for text, corpus, published in (
        (stack, "stack", "0.6912 1.131e+07 0.1894 0.3935 0.9978"),
        (pile, "pile", "1.2888 1.974e+08 0.1963 0.3345 0.9987"),
    ):
        found = figures[corpus]
        for label, theirs in zip(("E", "A", "alpha", "k", "R2"), published.split(), strict=True):
            line = re.search(rf"^{label} .*$", text, re.MULTILINE)[0]
            assert line.endswith(f" {theirs}")
        for row in found["parameters"].values():
            assert row["low"] < row["value"] < row["high"]
        assert found["objective"] <= found["published"]["objective"]
        assert f"{found['objective']:.8g}" in text
        assert list(found["multipliers"]["law"]) == ["2", "4", "8"]
        assert [len(found["left_out"][by]) for by in ("streams", "params")] == [4, 6]
        best = min(found["rivals"].items(), key=lambda rival: rival[1]["objective"])
        assert best[0] == "logarithm"
        assert len(found["rivals"]) == 5
        assert found["not_identified"] == []
        assert "All four parameters are identified" in text
        assert "seed" not in text
    drawn = picture(files[0])
    for word in ("stack", "pile", "P = 8", "N = 4.35B", "1.57B"):
        assert word in drawn


def test_runs_with_seeds(tmp_path, capfd):
    data = write(tmp_path / "runs.csv", params=(1e5, 1.3e5, 1.7e5), noise=2e-3)
    words = [f"--data={data}", "--bootstrap=40", f"--json={tmp_path / 'law.json'}"]
    out = printed(capfd, "fit", *words)
    found = json.loads((tmp_path / "law.json").read_text())["texts"]
    assert found["published"] is None
    assert "published" not in out
    # Sizes within a factor of 2 leave E and A to trade off.
    assert f"NOT IDENTIFIED by these points: {', '.join(found['not_identified'])}" in out
    assert "A" in found["not_identified"]
    assert len(found["cells"]) == 9
    assert {cell["seeds"] for cell in found["cells"]} == {2}
    effects = {(row["params"], row["streams"]): row for row in found["paired_effect"]}
    assert len(effects) == 6
    for (N, P), row in effects.items():
        # Two seeds: the standard error of the difference is 2e-3; the shift of the seeds is gone.
        assert abs(row["mean"] - (LAW.loss(N, P) - LAW.loss(N, 1))) < 8e-3
        assert f"{row['low']:+.4f} to {row['high']:+.4f}" in out
    assert [left["parameters"] is None for left in found["left_out"]["params"]] == [True] * 3
    assert "the rest is too little for a fit" in out


def test_no_effect_and_harm_are_told(tmp_path, capfd):
    path = tmp_path / "runs.csv"
    for k, message in ((0.0, "no effect of P either way"), (-0.1, "streams do harm")):
        law, rng = Law(1.5, 2e5, 0.4, (k,)), np.random.default_rng(0)
        rows = ["corpus,params,streams,loss"]
        for N in (1e5, 2e5, 4e5, 8e5):
            for P in (1, 2, 4):
                rows.append(f"texts,{N},{P},{law.loss(N, P) * np.exp(rng.normal(0, 1e-3))}")
        path.write_text("\n".join(rows))
        assert message in printed(capfd, "fit", f"--data={path}", "--bootstrap=40")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(suffix, tmp_path, capfd):
    figure = tmp_path / f"law.{suffix}"
    out = printed(capfd, "plot", f"--data={write(tmp_path / 'runs.csv')}", f"--figure={figure}")
    assert out == f"{figure}\n"
    text = picture(figure)
    if suffix == "svg":
        assert "P = 4" in text
        first = figure.read_bytes()
        printed(capfd, "plot", f"--data={tmp_path / 'runs.csv'}", f"--figure={figure}")
        assert figure.read_bytes() == first


def test_plot_of_too_few_points(tmp_path, capfd):
    data = write(tmp_path / "runs.csv", params=(1e5, 2e5), streams=(1, 2))
    out = printed(capfd, "plot", f"--data={data}", f"--figure={tmp_path / 'law.svg'}")
    assert "texts: lines join the points, no law is fitted: too few points" in out
    assert "P = 2" in picture(tmp_path / "law.svg")


def test_prediction(capfd):
    words = ["--params=1.6e9", "--streams=8", "--target=1.05"]
    out = printed(capfd, "predict", "--law=0.69,1.13e7,0.19,0.4", *words)
    m = 1 + 0.4 * np.log(8)
    assert f"loss {0.69 + (1.13e7 / (1.6e9 * m)) ** 0.19:.4f}" in out
    assert f"as N {1.6 * m:.3g}B at P 1 ({m:.3f} times" in out
    size = 1.13e7 / (1.05 - 0.69) ** (1 / 0.19)
    rows = [line.split() for line in out.splitlines() if re.match(r" +\d", line)]
    assert [row[0] for row in rows] == ["1", "2", "4", "8"]
    for P, (_, N, flops, gigabytes) in zip((1, 2, 4, 8), rows, strict=True):
        # Printed with three digits.
        expected = size / (1 + 0.4 * np.log(P))
        assert float(N.removesuffix("B")) == pytest.approx(expected / 1e9, rel=5e-3)
        assert float(flops) == pytest.approx(2 * P * expected, rel=5e-3)
        assert float(gigabytes) == pytest.approx(2 * expected / 1e9, rel=5e-3)


def test_prediction_from_data(tmp_path, capfd):
    out = printed(capfd, "predict", "--params=1.6e9", "--streams=8", "--target=1.02")
    # The published law at the paper's example: worth 2.9B parameters.
    assert re.search(r"stack: .*k 0\.393\d\n  N 1\.6B, P 8: loss 1\.04\d\d, as N 2\.91B", out)
    assert "loss 1.02: no size reaches it, E is 1.289" in out
    out = printed(capfd, "predict", "--params=1.6e9", "--corpus=pile")
    assert "stack" not in out
    assert "P 1: loss 1.9" in out
    data = write(tmp_path / "runs.csv", noise=1e-6)
    out = printed(capfd, "predict", f"--data={data}", "--params=3e5", "--streams=2")
    assert f"loss {LAW.loss(3e5, 2):.4f}" in out


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("fit", ["--data="], "--data is missing: expected published, or a CSV file"),
        ("fit", ["--data={tmp}/none.csv"], "none.csv: No such file or directory"),
        ("fit", ["--data={tmp}/header.csv"], "header.csv: missing columns params, loss; expected"),
        ("fit", ["--data={tmp}/cell.csv"], "cell.csv line 3: loss='low': expected a number"),
        ("fit", ["--data={tmp}/zero.csv"], "zero.csv line 2: streams=0: expected at least 1"),
        ("fit", ["--data={tmp}/few.csv"], "texts: too few points to identify E, A, alpha and k: "
         "expected at least 6 different pairs of params and streams; found 10 points with 5 "),
        ("fit", ["--bootstrap=10"], "--bootstrap=10: expected at least 40"),
        ("fit", ["--json={tmp}"], "--json={tmp}: Is a directory"),
        ("fit", ["--figure={tmp}/law.jpg"], "law.jpg: expected a figure that ends in .png or .svg"),
        ("plot", [], "--figure is missing"),
        ("plot", ["--figure={tmp}/no/law.png"], "law.png: No such file or directory"),
        ("predict", [], "--params is missing"),
        ("predict", ["--params=-1"], "--params=-1.0: expected a number above 0"),
        ("predict", ["--params=1e9", "--streams=0"], "--streams=0: expected a number above 0"),
        ("predict", ["--params=1e9", "--corpus=stak"], '(did you mean "stack"?)'),
        ("predict", ["--params=1e9", "--law=1,2,3"], "--law=1,2,3: expected four numbers"),
        ("predict", ["--params=1e9", "--law=1,-2,3,4"], "--law=1,-2,3,4: expected numbers, E, A"),
        ("predict", ["--params=1e9", "--law=1,2,3,-0.5"], "k = -0.5 gives no k ln P + 1 above 0"),
        ("predict", ["--target=0.5"], "loss 0.5: no size reaches it; expected more than"),
    ],
)  # fmt: skip
def test_bad_input(name, words, message, tmp_path, capfd):
    header = "corpus,params,streams,loss\n"
    (tmp_path / "header.csv").write_text("corpus,streams\nx,1\n")
    (tmp_path / "cell.csv").write_text(header + "x,1e6,1,2.0\nx,1e6,2,low\n")
    (tmp_path / "zero.csv").write_text(header + "x,1e6,0,2.0\n")
    few = write(tmp_path / "few.csv", params=(1e5, 2e5, 4e5), streams=(1, 2))
    few.write_text("".join(line for line in few.open() if not line.startswith("texts,400000.0,2")))
    before = sorted(tmp_path.iterdir())
    line = refusal(capfd, name, *(word.format(tmp=tmp_path) for word in words))
    assert message.format(tmp=tmp_path) in line
    assert sorted(tmp_path.iterdir()) == before


def test_commands(monkeypatch, capfd):
    for words, code, message in (
        (["--help"], 0, "  predict   Predicts the loss"),
        (["predict", "--help"], 0, "--target=..."),
        (["fitt"], 2, 'fitt: no such command (did you mean "fit"?); expected one of '),
        ([], 2, "no command; expected one of "),
    ):
        monkeypatch.setenv("PARSCALE_KEEP_ALLOCATOR", "1")
        monkeypatch.setattr(sys, "argv", ["scaling_law", *words])
        with pytest.raises(SystemExit) as exit_:
            program.run_commands(scaling_law.COMMANDS, scaling_law.__doc__)
        assert exit_.value.code == code
        assert message in "".join(capfd.readouterr())
