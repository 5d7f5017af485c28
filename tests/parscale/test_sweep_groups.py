import numpy as np
import pytest
from scipy import stats

from parscale import sweep_groups
from sharding.settings import InputError

HEADER = "run,seed,params,streams,flops,loss\n"


def write(tmp_path, rows):
    path = tmp_path / "runs.csv"
    path.write_text(HEADER + "".join(f"{row}\n" for row in rows))
    return path


def test_groups_are_compared_seed_by_seed(tmp_path):
    losses = {"base": [2.0, 2.1, 2.3], "wide-r0.1": [1.9, 2.05, 2.1]}
    rows = [f"base-s{s},{s},100,1,1e9,{x}" for s, x in enumerate(losses["base"])]
    rows += [f"wide-r0.1-s{s},{s},400,1,4e9,{x}" for s, x in enumerate(losses["wide-r0.1"])]
    rows += ["other-s7,7,100,2,2e9,1.5", "diverged-s0,0,100,1,1e9,nan"]
    header, base, wide, other, diverged = sweep_groups.compare(
        sweep_groups.read_groups(write(tmp_path, rows)), "base"
    )
    assert header[6] == "less base"
    assert base[:6] == ["base", "1", "100", "1.00 x", "3", "2.1333"]
    change = np.subtract(losses["wide-r0.1"], losses["base"])
    low, high = stats.ttest_1samp(change, 0).confidence_interval(0.95)
    assert wide[3] == "4.00 x"
    assert wide[6:] == [f"{change.mean():+.4f}", f"{low:+.4f} to {high:+.4f}"]
    assert other[6:] == ["", ""]
    assert diverged[5:] == ["nan", "+nan", ""]


def test_bad_input_is_named(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        sweep_groups.read_groups(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="missing column run, seed"):
        sweep_groups.read_groups(tmp_path / "other.csv")
    with pytest.raises(InputError, match="line 2: could not convert"):
        sweep_groups.read_groups(write(tmp_path, ["a-s0,0,1,1,1,x"]))
    groups = sweep_groups.read_groups(write(tmp_path, ["base-s0,0,1,1,1,2"]))
    with pytest.raises(InputError, match=r"baseline bass: expected one of base.*base"):
        sweep_groups.compare(groups, "bass")
