"""The report of a run and of a sweep: what they hold is in the page, which stands alone."""

import csv
import re

import pytest
import runs

from experiments import report

pytestmark = pytest.mark.usefixtures("compiler")


def written(folder, tmp_path, capfd, *words) -> str:
    path = tmp_path / "page.html"
    assert runs.call(report, f"--workdir={folder}", f"--output={path}", *words) == 0
    assert capfd.readouterr().out.splitlines()[-1] == str(path)
    text = path.read_text()
    assert not re.findall(r'(?:src|href|srcset)="(?!data:)', text)
    return text


def cells(text: str) -> list[list[str]]:
    """The rows of all tables."""
    lines = re.findall(r"<tr>(.*?)</tr>", text)
    return [re.findall(r"<t[dh]>(.*?)</t[dh]>", line) for line in lines]


def test_a_run(two, tmp_path, capfd):
    text = written(two, tmp_path, capfd, "--chip=v5e")
    result = runs.result(two)
    rows = cells(text)
    assert ["held-out loss, nats per token", f"{result['held_out_loss']:.4f}"] in rows
    assert ["P, streams", "2"] in rows
    assert "Predicted, not measured: a roofline for one v5e" in text
    assert [two.name, "2"] in [row[:2] for row in rows]
    costs = {row[0]: row for row in rows if row[0].startswith("P = ")}
    cache = [float(costs[f"P = {streams}"][4]) for streams in (1, 2, 4, 8)]
    assert cache == pytest.approx([cache[0] * n for n in (1, 2, 4, 8)], rel=0.1)


def test_a_sweep(two, one, tmp_path, capfd):
    """A table as a sweep writes it, over runs that are there."""
    folder = tmp_path / "sweep"
    folder.mkdir()
    rows = []
    for seed, (streams, run) in enumerate([(1, one), (2, two)] * 2):
        name = f"P{streams}-s{seed // 2}"
        runs.copy(run, folder / name)
        rows.append(
            {
                "run": name, "corpus": "text", "params": 1000 * streams, "streams": streams,
                "loss": 3 - streams / 10 + seed / 100, "seed": seed // 2, "width": 16,
                "learning_rate": 0.01, "commit": "abc", "device": "1 x cpu", "steps": 8,
            }
        )  # fmt: skip
    with (folder / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    text = written(folder, tmp_path, capfd)
    found = cells(text)
    assert ["width 16, P = 1", "1,000", "0.01", "2", "2.9100", "0.0141"] in found
    assert ["width 16, P = 2", "2,000", "0.01", "2", "2.8200", "0.0141"] in found
    assert "4 runs; commit abc; device 1 x cpu; steps 8." in text
    # One size does not identify a law; the paired difference needs none.
    assert "no law is fitted" in text
    assert text.count("<img") == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--workdir is missing"),
        (["--workdir={tmp}/none"], "{tmp}/none: no such folder"),
        (["--workdir={tmp}"], "expected the folder of a sweep (runs.csv) or of a run"),
        (["--workdir={tmp}", "--chip=H10"], 'did you mean "H100"'),
        (["--workdir={two}", "--output={tmp}/none/page.html"], "no such folder"),
    ],
)
def test_bad_input(words, expected, two, tmp_path, capfd):
    fill = lambda text: text.format(tmp=tmp_path, two=two)
    assert fill(expected) in runs.refusal(capfd, report, *map(fill, words))
