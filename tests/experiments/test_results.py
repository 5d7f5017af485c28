"""What experiments/results/ claims is what the code does: one run of the CPU law, repeated."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
RUN = "s0-D32-P2"


@pytest.mark.slow
def test_a_run_of_the_law_repeats(tmp_path):
    with (RESULTS / "law_cpu.csv").open(newline="") as file:
        claimed = next(row for row in csv.DictReader(file) if row["run"] == RUN)
    command = ["experiments.scaling_law", "sweep", "--config=law_cpu"]
    done = subprocess.run(
        [sys.executable, "-m", *command, f"--only={RUN}", f"--workdir={tmp_path}"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (tmp_path / "runs.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    if row["corpus_sha256"] != claimed["corpus_sha256"]:
        pytest.skip("the library of another version of Python: its runs have other losses")
    assert float(row["loss"]) == pytest.approx(float(claimed["loss"]), abs=1e-3)
    assert (row["params"], row["tokens"]) == (claimed["params"], claimed["tokens"])
