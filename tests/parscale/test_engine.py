"""The generation engine: what a request writes does not depend on others, on rows, or on memory."""

import dataclasses
import gc

import jax
import numpy as np
import pytest
from engine_models import SMALL, check_greedy, make_model

from models.config import MIXERS
from models.growth import first_stream
from parscale.branches import join
from parscale.engine import Engine, Request
from parscale.sampling import Sampling
from sharding.mesh import MeshConfig, make_mesh
from sharding.settings import InputError

pytestmark = pytest.mark.usefixtures("little_optimization")

ALONE = dataclasses.replace(SMALL, streams=1)
WAYS = (
    Sampling(temperature=0.0),
    Sampling(temperature=1.0, seed=5),
    Sampling(temperature=0.7, top_k=5, seed=6, index=3),
    Sampling(temperature=1.3, top_p=0.8, seed=2**32 - 1),
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
    requests = random_requests(np.random.default_rng(0), 12, (1, 2), 40, 20)
    check_mixed(
        models,
        requests,
        length=64,
        alone={"cache_tokens": 1024, "rows": 1},
        together=[{"cache_tokens": 192, "rows": 2, "burst": 3}],
    )


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


def continue_twice(root, request):
    """Two forks of a text go on, each on its own."""
    yield [root.write(request.prompt, 4)]
    first, second = root.fork(2)
    yield [first.write([7], 6), second.write([8, 9], 3)]
    yield [first.write([5, 6], 2), second.write((), 4)]
    return [*root.new, 7, *first.new]  # of the last write alone


def check_forks(config, count: int = 2, **engine) -> None:
    """Forks of a text write what the forward pass says, whatever the mixers."""
    model = make_model(config)
    written = {}

    def script(root, request):
        name = request.prompt[0]
        lines = written[name] = [list(request.prompt), None, None]
        yield [root.write(request.prompt, 4)]
        lines[0] += root.new
        paths = root.fork(2)
        yield [paths[0].write([7], 6), paths[1].write([8, 9], 3)]
        lines[1], lines[2] = [[*lines[0], 7, *paths[0].new], [*lines[0], 8, 9, *paths[1].new]]
        yield [paths[0].write([5, 6], 2), paths[1].write((), 4)]
        lines[1] += [5, 6, *paths[0].new]
        lines[2] += paths[1].new

    engine = Engine(model, **{"cache_tokens": 1024, "rows": 4} | engine)
    prompts = [[number, *range(10, 10 + 6 * number)] for number in range(count)]
    numbers = [engine.submit(Request(prompt, 1, layout=script)) for prompt in prompts]
    results = engine.run()
    for number, prompt in zip(numbers, prompts, strict=True):
        assert results[number].error is None, results[number].error
        size = len(prompt)
        _, first, second = written[prompt[0]]
        for line, forced in (
            (first, (size + 4, size + 11, size + 12)),
            (second, (size + 4, size + 5)),
        ):
            check_line(model, line, size, forced)
    assert engine.memory.held == engine.memory.promised == 0


def check_line(model, line, start, forced) -> None:
    """Tokens of a line from `start` on, but those `forced`, are the most likely ones."""
    from engine_models import check_best, logits_of

    logits = logits_of(model, line, 40)
    places = [place for place in range(start, len(line)) if place not in forced]
    check_best(logits[[place - 1 for place in places]], [line[place] for place in places])


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
    check_forks(config, rows=3)


@pytest.mark.slow
@pytest.mark.parametrize("mixers", [("gla",), ("attention", "kda")], ids=",".join)
def test_forks_of_recurrences_after_soft_tokens(mixers):
    check_forks(dataclasses.replace(SMALL, mixers=mixers, transform="soft_tokens"))


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
        yield [engine_branch.write([2]) for engine_branch in [root.owner.new_branch()]]

    engine = Engine(make_model(ALONE), cache_tokens=512, rows=8, burst=2)
    number = engine.submit(Request(range(16, 16 + 8), 1, layout=lambda r, q: long(script, r, q)))

    def long(script, root, request):
        yield from script(root, dataclasses.replace(request, prompt=[3] * 160))

    assert engine.run()[number].error is None
    # Ten blocks of 16 tokens; then one more for each branch.
    assert held == [10, 15, 16, 16, 0]


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
    engines = {tokens: Engine(m, cache_tokens=512) for tokens, m in ((2, model), (3, alone))}
    results = []
    for tokens, engine in engines.items():
        number = engine.submit(Request([1], tokens, layout=script))
        results.append(engine.run()[number])
        assert results[-1].error is None
        assert engine.memory.held == engine.memory.promised == 0
    assert held == {2: 3, 3: 3}
    for shared, own in zip(keys[2], keys[3], strict=True):
        # [entries, P, slots, K, h]; the last block is not full.
        shared, own = (
            np.moveaxis(x, 1, 0).reshape(x.shape[1], 48, -1)[:, :40] for x in (shared, own)
        )
        np.testing.assert_array_equal(shared[0], shared[1])
        np.testing.assert_allclose(shared[:1], own, rtol=0, atol=1e-6)


def test_cancelled_requests_free_what_they_hold():
    engine = Engine(make_model(ALONE), cache_tokens=160, rows=2, burst=2)
    numbers = [engine.submit(Request([1, 2, 3], 30)) for _ in range(6)]
    for _ in range(3):
        engine.step()
    assert engine.memory.held
    for number in (numbers[0], numbers[5], 99):  # running, waiting, unknown
        engine.cancel(number)
    results = engine.run()
    assert sorted(results) == numbers[1:5]
    assert len({tuple(result.tokens) for result in results.values()}) == 1
    for _ in range(2):
        engine.submit(Request([1, 2, 3], 30))
        engine.step()
    for number in (6, 7):
        engine.cancel(number)
    assert engine.idle
    assert engine.memory.held == engine.memory.promised == 0


def test_requests_that_ask_for_more_than_is_left_begin_again():
    def script(root, request):
        yield [root.write(request.prompt)]
        forks = root.fork(4)
        yield [fork.write([n], 20) for n, fork in enumerate(forks)]
        whole = join(forks)
        yield [whole.write([1], 5)]
        return [token for branch in (*forks, whole) for token in branch.new]

    requests = [
        Request([n, 1], 2, Sampling(seed=n, temperature=1.0), layout=script) for n in range(5)
    ]
    expected = write_alone(make_model(ALONE), requests, cache_tokens=4096, rows=4)
    engine = Engine(make_model(ALONE), cache_tokens=16 * 13, rows=12, burst=4)
    numbers = [engine.submit(request) for request in requests]
    told, results, most = {}, {}, 0
    while not engine.idle:
        for event in engine.step():
            told.setdefault((event.request, event.branch), []).extend(event.tokens)
            if event.result is not None:
                results[event.request] = event.result
        most = max(most, engine.memory.held)
    assert most >= 12
    for number, tokens in zip(numbers, expected, strict=True):
        assert results[number].error is None, results[number].error
        assert results[number].tokens == tokens
        assert [t for branch in (1, 2, 3, 4, 5) for t in told[number, branch]] == tokens
    assert engine.memory.held == engine.memory.promised == 0


def test_a_request_that_never_fits_fails_by_name_and_the_others_go_on():
    def script(root, request):
        yield [root.write(request.prompt)]
        yield [fork.write([1], 10) for fork in root.fork(9)]

    engine = Engine(make_model(ALONE), cache_tokens=128)
    with pytest.raises(InputError, match="request 0 needs 9 blocks of the cache"):
        engine.submit(Request([1] * 100, 40))
    numbers = [
        engine.submit(Request([1, 2], 5)),
        engine.submit(Request([1, 2], 5, layout=script)),
        engine.submit(Request([1, 2], 5)),
    ]
    results = engine.run()
    error = str(results[numbers[1]].error)
    assert error.startswith("request 2: its branches need more than the 8 blocks")
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

    engine = Engine(make_model(ALONE), cache_tokens=1024, rows=16, burst=2)

    def write(some):
        for number in range(some):
            wrong = [1, 99] if number % 7 == 0 else [1, 2]
            layout = {"layout": script} if number % 3 == 0 else {}
            request = Request(wrong[:1], 1 + number % 3, WAYS[number % 2], **layout)
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, "request 1 is empty"),
        ({"tokens": 0}, "request 1: tokens=0: expected at least 1"),
        ({"prompt": [1, 31]}, "request 1 has token id 31, but the model's vocabulary is 31"),
        ({"prompt": [-1]}, "request 1 has token id -1"),
        ({"prompt": ["a"]}, "request 1 has 'a': expected token ids"),
        ({"prompt": [1.0]}, "request 1 has 1.0: expected token ids"),
        (
            {"prompt": [1] * 100},
            "request 1 of 100 tokens and 29 new ones are more than the model's",
        ),
        (
            {"prompt": [1] * 99},
            "request 1 needs 8 blocks of the cache for each stream, which has 4",
        ),
        ({"streams": 3}, "request 1 wants streams=3: the engine has models of 1"),
    ],
)
def test_requests_that_could_never_be_run(fields, message):
    engine = Engine(make_model(dataclasses.replace(ALONE, max_length=128)), cache_tokens=64)
    number = engine.submit(Request([1], 29))
    with pytest.raises(InputError) as error:
        engine.submit(Request(**{"prompt": [1], "tokens": 29} | fields))
    assert message in str(error.value)
    assert not engine.idle
    engine.cancel(number)
    assert engine.idle


def test_engines_that_cannot_be():
    models = family(1, 2)
    for name in ("cache_tokens", "rows", "slots", "burst"):
        with pytest.raises(InputError, match=f"{name}=0: expected at least 1"):
            Engine(models, **{"cache_tokens": 64, name: 0})
    with pytest.raises(InputError, match="without a model"):
        Engine({}, cache_tokens=64)
    with pytest.raises(InputError, match="streams=4 has 2"):
        Engine({4: models[2]}, cache_tokens=64)
    with pytest.raises(InputError, match="layers=2 and 1"):
        Engine({1: models[1], 2: family(2, layers=1)[2]}, cache_tokens=64)
    soft = family(2, transform="soft_tokens", transform_size=40)[2]
    with pytest.raises(InputError, match="less than what stands before every text"):
        Engine(soft, cache_tokens=64)


def test_what_soft_tokens_hold_is_not_counted_as_room():
    model = family(2, transform="soft_tokens")[2]
    engine = Engine(model, cache_tokens=128)  # eight blocks, of which the soft tokens take two
    with pytest.raises(InputError, match="request 0 needs 4 blocks .* which has 3"):
        engine.submit(Request([1] * 40, 20))
    number = engine.submit(Request([1] * 28, 20))
    assert len(engine.run()[number].tokens) == 20


def test_choices_depend_on_seed_index_branch_and_position():
    def write(seed, index, branch, prompt):
        def script(root, request):
            forks = root.fork(3)
            yield [forks[branch].write(prompt, 12)]
            return forks[branch].new

        sampling = Sampling(temperature=3.0, seed=seed, index=index)
        return tuple(
            write_alone(
                make_model(ALONE), [Request([1], 1, sampling, layout=script)], cache_tokens=256
            )[0]
        )

    first = write(1, 2, 0, [1, 2, 3])
    assert first == write(1, 2, 0, [1, 2, 3])
    others = [write(2, 2, 0, [1, 2, 3]), write(1, 3, 0, [1, 2, 3]), write(1, 2, 1, [1, 2, 3])]
    assert len({first, *others}) == 4


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
    config = dataclasses.replace(SMALL, **fields)
    requests = [
        Request([n + 1] * (1 + 3 * n), 5, WAYS[n % 2], layout=continue_twice) for n in range(5)
    ]
    expected = write_alone(make_model(config), requests, cache_tokens=512, rows=4)
    with jax.set_mesh(make_mesh(MeshConfig(**axes))):
        engine = Engine(make_model(config), cache_tokens=1024, rows=4)
        numbers = [engine.submit(request) for request in requests]
        results = engine.run()
        assert engine.memory.held == engine.memory.promised == 0
    for number, tokens in zip(numbers, expected, strict=True):
        assert results[number].error is None, results[number].error
        assert results[number].tokens == tokens
