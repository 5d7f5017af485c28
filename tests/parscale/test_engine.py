"""The generation engine: what a request writes does not depend on others, on rows, or on memory."""

import dataclasses
import gc

import jax
import numpy as np
import pytest
from engine_models import SMALL, check_best, check_greedy, logits_of, make_model

from models.config import MIXERS
from models.growth import first_stream
from parscale import engine_rows
from parscale.branches import join
from parscale.engine import Engine, Request
from parscale.sampling import Sampling
from sharding.mesh import MeshConfig, make_mesh
from sharding.settings import InputError

pytestmark = pytest.mark.usefixtures("little_optimization", "few_shapes")

ALONE = dataclasses.replace(SMALL, streams=1)
# All but those of one test have a cache of this size, which steps are compiled for.
SIZES = {"cache_tokens": 512, "rows": 4}
WAYS = (
    Sampling(temperature=0.0),
    Sampling(temperature=0.7, top_k=5, seed=6, index=3),
    Sampling(temperature=1.3, top_p=0.8, seed=2**32 - 1),
    Sampling(temperature=1.0, seed=5),
)


def family(*streams: int, **fields) -> dict:
    return {n: make_model(dataclasses.replace(SMALL, streams=n, **fields)) for n in streams}


def random_requests(rng, count: int, streams, prompt: int, tokens: int) -> list[Request]:
    """Of lengths up to `prompt` and `tokens`, most of them shorter."""

    def length(most):
        return int(np.ceil(most ** rng.random()))

    return [
        Request(
            rng.integers(0, 31, length(prompt)).tolist(),
            length(tokens),
            WAYS[number % len(WAYS)],
            streams=int(rng.choice(streams)),
            until=frozenset({(3, 9), (17,)}) if rng.random() < 0.3 else frozenset(),
        )
        for number in range(count)
    ]


def write_alone(models, requests, **engine) -> list[list[int]]:
    """The tokens of each request, one after the other in an engine."""
    engine = Engine(models, **engine)
    found = []
    for request in requests:
        number = engine.submit(request)
        found.append(engine.run()[number].tokens)
    return found


def check_mixed(models, requests, *, length: int, alone: dict, together: list[dict]) -> None:
    expected = write_alone(models, requests, **alone)
    for request, tokens in zip(requests, expected, strict=True):
        assert len(tokens) == request.tokens or any(
            tuple(tokens[-len(end) :]) == end for end in request.until
        )
        if request.sampling.temperature == 0:
            check_greedy(models[request.streams], request.prompt, tokens, length)
    for number, settings in enumerate(together):
        engine = Engine(models, **settings)
        rng = np.random.default_rng(number)
        waiting, found, told = list(enumerate(requests)), {}, {}
        names = {}
        rng.shuffle(waiting)
        while waiting or not engine.idle:
            for _ in range(rng.integers(0, 4)):
                if waiting:
                    name, request = waiting.pop()
                    names[engine.submit(request)] = name
            for event in engine.step():
                told.setdefault(names[event.request], []).extend(event.tokens)
                if event.result is not None:
                    assert event.result.error is None
                    found[names[event.request]] = event.result
        assert engine.memory.held == engine.memory.promised == 0
        for name, tokens in enumerate(expected):
            assert found[name].tokens == told[name] == tokens
            ledger = found[name].ledger
            assert (ledger.generated, ledger.longest) == (len(tokens), len(tokens))
            assert ledger.written == len(requests[name].prompt)


def test_mixed_requests_write_what_each_writes_alone():
    models = family(1, 2)
    requests = random_requests(np.random.default_rng(0), 16, (1, 2), 32, 40)
    for number, request in enumerate(requests):
        if request.sampling == WAYS[3]:
            requests[number] = dataclasses.replace(request, sampling=WAYS[0])
    check_mixed(models, requests, length=72, alone=SIZES, together=[SIZES | {"rows": 2}])


@pytest.mark.slow
def test_mixed_requests_of_up_to_2000_tokens():
    models = family(1, 2, 8, max_length=4096)
    rng = np.random.default_rng(1)
    requests = random_requests(rng, 24, (1, 2, 8), 2000, 300)
    requests.append(Request([4], 2000, streams=1))
    requests.append(Request(rng.integers(0, 31, 2000).tolist(), 1, streams=8))
    check_mixed(
        models,
        requests,
        length=2304,
        alone={"cache_tokens": 8 * 2400, "rows": 1},
        together=[
            {"cache_tokens": 8 * 2400, "rows": 4},
            {"cache_tokens": 8 * 2100, "rows": 2, "burst": 32, "slots": 32},
        ],
    )


def write_forks(model, count: int = 2, **engine) -> list[tuple[list[int], list[int]]]:
    """Lines of texts that fork in two, and of each the places of tokens that were given."""
    lines = {}

    def script(root, request):
        yield [root.write(request.prompt, 4)]
        size, line = len(request.prompt), [*request.prompt, *root.new]
        paths = root.fork(2)
        yield [paths[0].write([7], 6), paths[1].write([8, 9], 3)]
        first, second = [*line, 7, *paths[0].new, 5, 6], [*line, 8, 9, *paths[1].new]
        yield [paths[0].write([5, 6], 2), paths[1].write((), 4)]
        given = [*range(size), size + 4]
        lines[size, 0] = [*first, *paths[0].new], [*given, size + 11, size + 12]
        lines[size, 1] = [*second, *paths[1].new], [*given, size + 5]

    engine = Engine(model, **SIZES | engine)
    prompts = [range(10, 11 + 6 * number) for number in range(count)]
    numbers = [engine.submit(Request(prompt, 1, layout=script)) for prompt in prompts]
    results = engine.run()
    for number in numbers:
        assert results[number].error is None, results[number].error
        assert results[number].ledger.longest == 4 + 6 + 2
        assert results[number].ledger.generated == 4 + 6 + 3 + 2 + 4
    assert engine.memory.held == engine.memory.promised == 0
    assert len(lines) == 2 * count
    return list(lines.values())


def check_lines(model, lines) -> None:
    """All tokens but those that were given are the most likely ones."""
    for line, given in lines:
        logits = logits_of(model, line, 40)
        places = np.array([place for place in range(len(line)) if place not in given])
        check_best(logits[places - 1], np.array(line)[places])


def check_forks(config) -> None:
    model = make_model(config)
    check_lines(model, write_forks(model))


slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("streams", "transform", "layer_loop"),
    [
        (2, "soft_tokens", "scan"),
        slow(2, "soft_tokens", "auto"),
        slow(2, "low_rank", "scan"),
        slow(2, "bias", "auto"),
        slow(8, "prefix", "scan"),
    ],
)
def test_forks_of_every_transform(streams, transform, layer_loop):
    config = dataclasses.replace(SMALL, streams=streams, transform=transform, layer_loop=layer_loop)
    check_forks(config)


@pytest.mark.parametrize("layer_loop", ["auto", slow("scan")])
@pytest.mark.parametrize(
    "mixers",
    [
        ("retention", "window"),
        slow(("gated_delta_net", "attention", "mlstm_exp")),
        *(slow((mixer,)) for mixer in MIXERS),
    ],
    ids=",".join,
)
def test_forks_of_every_mixer(mixers, layer_loop):
    layers = max(len(mixers), 2)
    config = dataclasses.replace(
        SMALL, mixers=mixers, layers=layers, window=4, key_dim=6, layer_loop=layer_loop
    )
    check_forks(config)


@pytest.mark.slow
@pytest.mark.parametrize("mixers", [("gla",), ("attention", "kda")], ids=",".join)
def test_forks_of_recurrences_after_soft_tokens(mixers):
    check_forks(dataclasses.replace(SMALL, mixers=mixers, transform="soft_tokens"))


def test_views_grow_with_their_texts(monkeypatch):
    """Not with what is promised to them; steps of several sizes write one text."""
    sizes = []
    seen = engine_rows.Group._seen

    def noted(*arguments, **options):
        found = seen(*arguments, **options)
        sizes.append(found.blocks.shape[-1])
        return found

    monkeypatch.setattr(engine_rows, "FEWEST_BLOCKS", 2)
    monkeypatch.setattr(engine_rows.Group, "_seen", noted)
    engine = Engine(make_model(ALONE), slots=4, **SIZES)
    prompt = [1, 2, 3]
    number = engine.submit(Request(prompt, 38))
    tokens = engine.run()[number].tokens
    assert len(tokens) == 38
    # None for the prompt; up to a power of 2 for 8 tokens more each time.
    assert list(dict.fromkeys(sizes)) == [0, 4, 8, 16]
    check_greedy(make_model(ALONE), prompt, tokens, 64)


def test_forks_hold_one_copy_of_what_they_share():
    held = []

    def script(root, request):
        yield [root.write(request.prompt)]
        held.append(engine.memory.held)
        forks = root.fork(5)
        yield [fork.write([n], 3) for n, fork in enumerate(forks)]
        held.append(engine.memory.held)
        whole = join(forks)
        yield [whole.write([1])]
        held.append(engine.memory.held)
        for fork in forks:
            fork.drop()
        root.drop()
        held.append(engine.memory.held)
        whole.drop()
        held.append(engine.memory.held)

    engine = Engine(make_model(ALONE), **SIZES)
    number = engine.submit(Request([3] * 96, 1, layout=script))
    assert engine.run()[number].error is None
    # Six blocks of 16 tokens; then one more for each branch.
    assert held == [6, 11, 12, 12, 0]


def test_a_shared_prompt_is_the_first_streams_and_takes_its_memory_alone():
    model = make_model()
    prompt = np.random.default_rng(0).integers(0, 31, 40).tolist()
    held, keys = {}, {}

    def script(root, request):
        yield [root.write(prompt, shared=request.tokens == 2)]
        engine = engines[request.tokens]
        held[request.tokens] = engine.memory.held
        blocks = [entry.blocks for entry in root.entries]
        keys[request.tokens] = [np.asarray(pool.k)[np.array(blocks)] for pool in engine.pools]
        yield [root.write((), 3)]
        return root.new

    alone = first_stream(model)
    engines = {tokens: Engine(m, **SIZES) for tokens, m in ((2, model), (3, alone))}
    results = []
    for tokens, engine in engines.items():
        number = engine.submit(Request([1], tokens, layout=script))
        results.append(engine.run()[number])
        assert results[-1].error is None
        assert engine.memory.held == engine.memory.promised == 0
    assert held == {2: 3, 3: 3}
    for shared, own in zip(keys[2], keys[3], strict=True):
        # [entries, P, K, slots, h]; the last block is not full.
        shared, own = (
            np.moveaxis(x, (0, 3), (1, 2)).reshape(x.shape[1], 48, -1)[:, :40]
            for x in (shared, own)
        )
        np.testing.assert_array_equal(shared[0], shared[1])
        np.testing.assert_allclose(shared[:1], own, rtol=0, atol=1e-6)


def test_cancelled_requests_free_what_they_hold():
    engine = Engine(make_model(ALONE), **SIZES)
    numbers = [engine.submit(Request([1, 2, 3], 100)) for _ in range(6)]
    for _ in range(3):
        engine.step()
    assert engine.memory.held
    for number in (numbers[0], numbers[5], 99):  # running, waiting, unknown
        engine.cancel(number)
    results = engine.run()
    assert sorted(results) == numbers[1:5]
    assert len({tuple(result.tokens) for result in results.values()}) == 1
    for _ in range(2):
        engine.submit(Request([1, 2, 3], 100))
        engine.step()
    for number in (6, 7):
        engine.cancel(number)
    assert engine.idle
    assert engine.memory.held == engine.memory.promised == 0


def test_requests_that_ask_for_more_than_is_left_begin_again():
    def script(root, request):
        yield [root.write(request.prompt)]
        forks = root.fork(7)
        yield [fork.write([n], 20) for n, fork in enumerate(forks)]
        whole = join(forks)
        yield [whole.write([1], 5)]
        return [token for branch in (*forks, whole) for token in branch.new]

    requests = [Request([n, 1], 2, layout=script) for n in range(5)]
    expected = write_alone(make_model(ALONE), requests, **SIZES)
    engine = Engine(make_model(ALONE), **SIZES | {"rows": 16})
    began = []
    numbers = [engine.submit(request) for request in requests]
    told, results, most = {}, {}, 0
    while not engine.idle:
        for event in engine.step():
            told.setdefault((event.request, event.branch), []).extend(event.tokens)
            if event.result is not None:
                results[event.request] = event.result
        most = max(most, engine.memory.held)
        began += [active.number for active in engine._waiting if active.told]
    assert most >= 31
    assert began  # and some had told tokens when they were sent back
    for number, tokens in zip(numbers, expected, strict=True):
        assert results[number].error is None, results[number].error
        assert results[number].tokens == tokens
        assert [t for branch in range(1, 9) for t in told[number, branch]] == tokens
    assert engine.memory.held == engine.memory.promised == 0


def test_a_request_that_never_fits_fails_by_name_and_the_others_go_on():
    def script(root, request):
        yield [root.write(request.prompt)]
        yield [fork.write([1], 10) for fork in root.fork(32)]

    engine = Engine(make_model(ALONE), **SIZES)
    with pytest.raises(InputError, match="request 0 needs 33 blocks of the cache"):
        engine.submit(Request([1] * 500, 20))
    numbers = [
        engine.submit(Request([1, 2], 5)),
        engine.submit(Request([1, 2], 5, layout=script)),
        engine.submit(Request([1, 2], 5)),
    ]
    results = engine.run()
    error = str(results[numbers[1]].error)
    assert error.startswith("request 2: its branches need more than the 32 blocks")
    assert results[numbers[0]].tokens == results[numbers[2]].tokens
    assert len(results[numbers[0]].tokens) == 5


def growth(count: int) -> tuple[int, int, int]:
    """What an engine keeps of so many more short requests, after some: blocks, arrays, objects."""

    def script(root, request):
        yield [root.write(request.prompt, 2)]
        forks = root.fork(2)
        yield [fork.write([3], 1) for fork in forks]
        whole = join(forks)
        yield [whole.write([1], 1)]
        return whole.new

    engine = Engine(make_model(ALONE), **SIZES)

    def write(some):
        for number in range(some):
            wrong = [1, 99] if number % 7 == 0 else [1, 2]
            layout = {"layout": script} if number % 3 == 0 else {}
            request = Request(wrong[:1], 1 + number % 3, **layout)
            engine.submit(request)
            if number % 5 == 0:
                engine.cancel(engine.submit(request))
            if number % 50 == 49:
                engine.run()
        engine.run()
        gc.collect()
        return engine.memory.held, len(jax.live_arrays()), len(gc.get_objects())

    before = write(150)
    return tuple(np.subtract(write(count), before))


def test_short_requests_leave_nothing():
    blocks, arrays, objects = growth(300)
    assert (blocks, arrays) == (0, 0)
    assert objects < 100  # jax's and Python's own caches; a request has more than one object


@pytest.mark.slow
def test_ten_thousand_short_requests_leave_nothing():
    blocks, arrays, objects = growth(10_000)
    assert (blocks, arrays) == (0, 0)
    assert objects < 500


def test_choices_depend_on_seed_index_branch_and_position():
    def script(root, request):
        branches = root.fork(2)
        yield [branch.write(request.prompt, 12) for branch in branches]
        return [token for branch in branches for token in branch.new]

    def write(seed, index):
        sampling = Sampling(temperature=3.0, top_k=20, seed=seed, index=index)
        requests = [Request([1, 2, 3], 1, sampling, layout=script)]
        (tokens,) = write_alone(make_model(ALONE), requests, **SIZES)
        return [tuple(tokens[:12]), tuple(tokens[12:])]

    assert write(1, 2) == write(1, 2)
    assert len({*write(1, 2), *write(2, 2), *write(1, 3)}) == 6


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2, "stream": 2, "tensor": 2},
        slow({"fsdp": 4, "stream": 2}),
        slow({"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
@pytest.mark.parametrize(
    "fields",
    [
        {"transform": "soft_tokens"},
        slow({}),
        slow({"mixers": ("attention", "gated_delta_net"), "layer_loop": "scan"}),
    ],
)
def test_a_mesh_writes_the_same(axes, fields):
    model = make_model(dataclasses.replace(SMALL, **fields))
    with jax.set_mesh(make_mesh(MeshConfig(**axes))):
        lines = write_forks(model, count=3, cache_tokens=1024)
    check_lines(model, lines)
