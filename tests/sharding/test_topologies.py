"""Names of TPU slices."""

import pytest

from sharding.pods.topologies import FAMILIES, Topology, known_names, parse_topology
from sharding.settings import InputError


@pytest.mark.parametrize(
    ("name", "topology", "chips"),
    [
        ("v5e:16x16", Topology("v5e", (16, 16)), 256),
        ("v5litepod-256", Topology("v5e", (16, 16)), 256),
        ("v5e-8", Topology("v5e", (2, 4)), 8),
        ("v6e-256", Topology("v6e", (16, 16)), 256),
        ("V5P-128", Topology("v5p", (4, 4, 4)), 64),
        ("v5p:8x8x8", Topology("v5p", (8, 8, 8)), 512),
        ("v5p-8192", Topology("v5p", (16, 16, 16)), 4096),
        ("v4-8", Topology("v4", (2, 2, 1)), 4),
        ("tpu7x-128", Topology("tpu7x", (4, 4, 4)), 64),
        ("v4:4x4x12", Topology("v4", (4, 4, 12)), 192),
        ("2xv5e:16x16", Topology("v5e", (16, 16), 2), 512),
        (" 4xv6e-256 ", Topology("v6e", (16, 16), 4), 1024),
    ],
)
def test_names_of_people_and_of_the_compiler(name, topology, chips):
    found = parse_topology(name)
    assert found == topology
    assert found.chips == chips
    assert parse_topology(str(found)) == found


def test_every_name_that_is_offered_is_understood():
    names = known_names()
    assert len(names) == sum(len(family.shapes) for family in FAMILIES) == len(set(names))
    for name in names:
        family, number = name.split("-")
        cores = 1 if family in ("v5litepod", "v6e") else 2
        assert parse_topology(name).chips * cores == int(number)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", ["v5litepod", "v5p", "2x"]),
        ("v5x-256", ["no such slice", "did you mean", "v5e:1x1 to 16x16"]),
        ("v5p-100", ["no slice of v5p has that number", "128", "two on a chip"]),
        ("v5e-100", ["256 (chips)"]),
        ("v5e:4x4x4", ["2 dimensions", "v5e:16x16"]),
        ("v5p:16x16", ["3 dimensions"]),
        ("v5e:0x4", ["2 dimensions"]),
        ("0xv5e-16", ["no such slice"]),
        ("v5e", ["no such slice"]),
        ("H100", ["no such slice"]),
    ],
)
def test_an_unknown_slice_is_refused_with_those_there_are(name, words):
    with pytest.raises(InputError) as error:
        parse_topology(name)
    message = str(error.value)
    assert "\n" not in message
    assert f"topology={name}:" in message
    for word in words:
        assert word in message
