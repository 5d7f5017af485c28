import numpy as np
import pytest
from scipy import stats

from experiments.scaling_law import PUBLISHED
from parscale import law_points
from parscale.law_points import Points
from sharding.settings import InputError


def table(*rows):
    params, streams, loss, seed = zip(*rows, strict=True)
    return Points(np.array(params, float), np.array(streams), np.array(loss, float), np.array(seed))


def test_published_points():
    data = law_points.read_points(PUBLISHED)
    assert {corpus: len(points) for corpus, points in data.items()} == {"stack": 24, "pile": 24}
    for points in data.values():
        assert sorted(set(points.streams)) == [1, 2, 4, 8]
        # N of a model with P streams: width^2 + width + 1 for the aggregation and 36 layers of 48
        # keys and values of 2 heads for each stream, and the width once.
        known = np.unique(points.params[points.streams == 1])
        widths = dict(zip(known, (896, 1024, 1280, 1536, 2048, 2560), strict=True))
        sizes = law_points.sizes(points)
        for N, P, size in zip(points.params, points.streams, sizes, strict=True):
            D = widths[size]
            extra = P * (D * D + D + 1 + 36 * 2 * 48 * 2 * (D // 16)) + D
            assert N - size == (extra if P > 1 else 0)


def test_columns_in_any_order_and_others_ignored(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(
        "\ufeffrun,loss,streams, corpus,params,seed\na,2.5,1,x,1e6,3\n\nb,2.25,2,y,1.5e6,0\n"
        "c,2.125,4,x,1000000,3\n"
    )
    data = law_points.read_points(path)
    assert list(data) == ["x", "y"]
    np.testing.assert_array_equal(data["x"].params, [1e6, 1e6])
    np.testing.assert_array_equal(data["x"].streams, [1, 4])
    np.testing.assert_array_equal(data["x"].loss, [2.5, 2.125])
    np.testing.assert_array_equal(data["x"].seed, [3, 3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": missing columns corpus, params, streams, loss; expected corpus, params, streams, "
         "loss, found none"),
        ("corpus,params,stream,loss\n", ": missing column streams; expected corpus, params, "
         'streams, loss, found corpus, params, stream, loss (did you mean "stream"?)'),
        ("corpus,params,streams,loss\n", ": no runs; expected a row for each below the header"),
        ("corpus,params,streams,loss\nx,1e6,1,2\nx,many,1,2\n",
         " line 3: params='many': expected a number"),
        ("corpus,params,streams,loss\nx,-1e6,1,2\n",
         " line 2: params=-1e6: expected a number above 0"),
        ("corpus,params,streams,loss\nx,1e6,0,2\n", " line 2: streams=0: expected at least 1"),
        ("corpus,params,streams,loss\nx,1e6,1.5,2\n",
         " line 2: streams='1.5': expected a whole number"),
        ("corpus,params,streams,loss\nx,1e6,1,nan\n",
         " line 2: loss=nan: expected a number above 0"),
        ("corpus,params,streams,loss\nx,1e6,1\n", " line 2: loss='': expected a number"),
        ("corpus,params,streams,loss\n,1e6,1,2\n", " line 2: corpus is empty; expected its name"),
        ("corpus,params,streams,loss,seed\nx,1e6,1,2,-1\n",
         " line 2: seed=-1: expected at least 0"),
        ("corpus,params,streams,loss\nx,1e6,1,2\nx,1e6,1,2.1\n",
         " line 3: same corpus, params, streams and seed as line 2; expected a column `seed` that "
         "tells them apart"),
        ("corpus,params,streams,loss\nx,1e6,1,2,9\n",
         " line 2: 5 cells; expected 4, as in the header"),
    ],
)  # fmt: skip
def test_bad_tables(text, message, tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        law_points.read_points(path)
    assert str(error.value) == f"{path}{message}"


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match="none: No such file or directory; expected a CSV file"):
        law_points.read_points(tmp_path / "none")
    (tmp_path / "latin").write_bytes(b"corpus,params,streams,loss\ncaf\xe9,1,1,1\n")
    with pytest.raises(InputError, match="latin: not a CSV file in UTF-8"):
        law_points.read_points(tmp_path / "latin")


def test_sizes_though_streams_add_parameters():
    rows = [(100, 1), (200, 1), (110, 2), (220, 2), (150, 8), (290, 8), (400, 8)]
    points = table(*((params, streams, 1.0, 0) for params, streams in rows))
    # The largest with 8 streams has no sibling with fewer.
    assert law_points.sizes(points).tolist() == [100, 200, 100, 200, 100, 200, 400]


def test_cells():
    points = table((200, 1, 3.0, 0), (100, 1, 4.0, 0), (100, 1, 4.5, 1), (110, 2, 3.0, 0))
    assert law_points.cells(points) == [
        (100, 1, 4.25, pytest.approx(np.std([4, 4.5], ddof=1)), 2),
        (200, 1, 3.0, 0.0, 1),
        (110, 2, 3.0, 0.0, 1),
    ]


def test_paired_effect_against_a_t_test():
    rng = np.random.default_rng(0)
    seeds = range(4)
    common = rng.normal(0, 0.1, 4)  # what a seed does to both drops out
    alone, several = (base + common + rng.normal(0, 0.01, 4) for base in (2.0, 1.9))
    rows = [(100, 1, loss, seed) for loss, seed in zip(alone, seeds, strict=True)]
    rows += [
        (120, 4, loss, seed) for loss, seed in reversed(list(zip(several, seeds, strict=True)))
    ]
    rows += [(120, 4, 1.0, 9)]  # a seed without a pair
    rows += [(300, 1, 1.5, 0), (330, 4, 1.25, 0)]
    rows += [(900, 4, 1.0, 0)]  # a size without P = 1
    first, second = law_points.paired_effect(table(*rows))
    oracle = stats.ttest_1samp(several - alone, 0).confidence_interval(0.95)
    assert first[:2] == (100, 4)
    assert first.mean == pytest.approx((several - alone).mean(), rel=1e-12)
    assert (first.low, first.high) == pytest.approx((oracle.low, oracle.high), rel=1e-9)
    assert first.seeds == 4
    assert second[:3] == (300, 4, -0.25)
    assert np.isnan([second.low, second.high]).all()
