"""Scripts that fork, join, race and see each other, against one pass under the mask of the text."""

import dataclasses

import numpy as np
import pytest
from engine_models import SMALL, check_best, check_greedy, logits_of, make_model
from numpy_texts import Reference

from models.segments import Segment, lay_out
from parscale.branches import Race, join
from parscale.engine import Engine, Request
from parscale.layouts import plain, shared_prompt
from sharding.settings import InputError

pytestmark = pytest.mark.usefixtures("little_optimization", "few_shapes")


ROW = 160  # tokens of a whole text at most
# Of one stream, as plain as can be; branches are told apart by their marks.
ALONE = dataclasses.replace(SMALL, streams=1, branches=3)
RECURRENT = dataclasses.replace(
    SMALL, mixers=("retention", "window"), window=4, key_dim=6, max_length=64
)
SIZES = {"cache_tokens": 2048, "rows": 4}


@dataclasses.dataclass
class Piece:
    """A segment of a text to be written: what is given, how many are generated after it."""

    given: tuple[int, ...]
    most: int
    after: tuple[int, ...]
    mark: int = 0


def random_text(rng: np.random.Generator, vocab: int, depth: int) -> list[Piece]:
    """Forks whose branches fork and join again, at least one of them `depth` deep."""
    pieces: list[Piece] = []

    def add(after, given, most):
        tokens = tuple(map(int, rng.integers(0, vocab, given)))
        pieces.append(Piece(tokens, most, after, int(rng.integers(0, 4))))
        return len(pieces) - 1

    def grow(start, depth, surely):
        given = int(rng.integers(start is None, 5))
        end = add(() if start is None else (start,), given, int(rng.integers(0, 6)))
        if depth and (surely or rng.random() < 0.3):
            branches = range(rng.integers(2, 4))
            ends = tuple(grow(end, depth - 1, surely and not i) for i in branches)
            end = add(ends, int(rng.integers(1, 4)), int(rng.integers(0, 5)))
        return end

    end = grow(None, depth, True)
    add((end,), 2, 3)
    return pieces


class Writer:
    """A script that writes a text; keeps the tokens of its pieces."""

    def __init__(self, pieces: list[Piece], rng: np.random.Generator):
        self.pieces, self.rng = pieces, rng
        self.seed = int(rng.integers(2**32))

    def __call__(self, root, request):
        rng = np.random.default_rng(self.seed)  # the same when the request begins again
        pieces, self.tokens = self.pieces, {}
        ends = {}
        waiting = list(range(len(pieces)))
        users = {n: [m for m in waiting if n in pieces[m].after] for n in waiting}
        while waiting:
            ready = [n for n in waiting if ends.keys() >= set(pieces[n].after)]
            rng.shuffle(ready)
            ready = ready[: rng.integers(1, 4)]
            branches, writes = {}, []
            for number in ready:
                waiting.remove(number)
                piece = pieces[number]
                if not piece.after:
                    branch = root
                elif len(piece.after) > 1:
                    branch = join([ends[other] for other in piece.after])
                elif len(users[piece.after[0]]) == 1 and rng.random() < 0.5:
                    branch = ends[piece.after[0]]
                else:
                    (branch,) = ends[piece.after[0]].fork()
                branch.mark = piece.mark
                branches[number] = branch
                if piece.given or piece.most:
                    writes.append(branch.write(piece.given, piece.most))
            if writes:
                yield writes
            for number, branch in branches.items():
                piece = pieces[number]
                new = branch.new if piece.most else []
                self.tokens[number] = [*piece.given, *new]
                ends[number] = branch
        return [token for number in range(len(pieces)) for token in self.tokens[number]]


def check_text(model, pieces: list[Piece], tokens: dict[int, list[int]]) -> None:
    """Every generated token is the most likely one in a pass over the whole text."""
    segments = [Segment(tuple(tokens[n]), piece.after) for n, piece in enumerate(pieces)]
    layout = lay_out(segments)
    marks = np.array([pieces[n].mark for n in layout.segments]) if model.config.branches else None
    logits = logits_of(model, layout.ids, ROW, layout, marks)
    generated = np.concatenate(
        [np.arange(len(tokens[n])) >= len(piece.given) for n, piece in enumerate(pieces)]
    )
    assert sum(generated) == sum(piece.most for piece in pieces)
    check_best(logits[layout.before[generated]], layout.ids[generated])


def write_texts(model, count: int, seed: int, *, depth: int = 3, **engine) -> Engine:
    rng = np.random.default_rng(seed)
    writers = [Writer(random_text(rng, 31, depth), rng) for _ in range(count)]
    engine = Engine(model, **SIZES | engine)
    numbers = [engine.submit(Request([1], 1, layout=writer)) for writer in writers]
    results = engine.run()
    for number, writer in zip(numbers, writers, strict=True):
        assert results[number].error is None, results[number].error
        assert results[number].ledger.generated == sum(piece.most for piece in writer.pieces)
        check_text(model, writer.pieces, writer.tokens)
    assert engine.memory.held == engine.memory.promised == 0
    return engine


def test_random_texts_that_fork_and_join():
    write_texts(make_model(ALONE), 8, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("transform", ["prefix", "soft_tokens", "low_rank", "bias"])
def test_random_texts_of_every_transform(transform, seed):
    config = dataclasses.replace(SMALL, transform=transform, layer_loop=("scan", "auto")[seed % 2])
    write_texts(make_model(config), 12, seed, rows=3, burst=seed, slots=4 * seed)


@pytest.mark.slow
def test_random_texts_in_a_cache_that_is_too_small_for_them_together():
    engine = write_texts(make_model(), 12, 7, cache_tokens=1000, slots=4)
    assert engine.idle


def run(script, model=None, **engine):
    """The result of a script, and its engine."""
    engine = Engine(model or make_model(ALONE), **SIZES | engine)
    number = engine.submit(Request([1], 1, layout=script))
    result = engine.run()[number]
    assert engine.memory.held == engine.memory.promised == 0
    return result


@pytest.mark.parametrize("burst", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_a_race_stops_the_others_and_they_go_on_with_the_same_tokens(burst):
    found = {}

    def script(root, request):
        yield [root.write(range(10))]
        paths = root.fork(3)
        limits = [7, 20, 20]
        begins = zip(paths, limits, strict=True)
        yield Race([p.write([n], most) for n, (p, most) in enumerate(begins)])
        found["first"] = [list(path.new) for path in paths]
        yield [path.write((), 5) for path in paths[1:]]
        found["later"] = [list(path.new) for path in paths[1:]]

    assert run(script, burst=burst).error is None
    # All have as many tokens as the one that ended.
    assert [len(new) for new in found["first"]] == [7, 7, 7]
    for n, new in enumerate(found["first"]):
        tokens = [*new, *(found["later"][n - 1] if n else [])]
        check_greedy(make_model(ALONE), [*range(10), n], tokens, 40)


@pytest.mark.parametrize("model", [ALONE, pytest.param(RECURRENT, marks=pytest.mark.slow)])
def test_a_race_is_even_where_only_some_are_given_tokens(model):
    lines = {}

    def script(root, request):
        yield [root.write(range(10))]
        first, second = root.fork(2)
        yield [first.write([1], 3), second.write([2], 3)]
        lines[1], lines[2] = [1, *first.new, 5], [2, *second.new]
        yield Race([first.write([5], 20), second.write((), 6)])
        assert len(first.new) == len(second.new) == 6
        lines[1] += first.new
        lines[2] += second.new

    assert run(script, make_model(model)).error is None
    for number, line in lines.items():
        given = np.isin(np.arange(len(line)), [0, 4] if number == 1 else [0])
        logits = logits_of(make_model(model), [*range(10), *line], 40)[9:-1]
        check_best(logits[~given], np.array(line)[~given])


def test_tokens_that_follow_a_fork_or_a_prompt_need_no_new_one_before_them():
    found = []

    def script(root, request):
        yield [root.write(range(6))]
        first, second = root.fork(2)
        yield [first.write((), 4), second.write((), 4)]
        (third,) = second.fork()
        yield [second.write((), 3)]
        yield [third.write((), 5), first.write([], 2)]
        found.extend([first.new, second.new, third.new])
        whole = join([first, third])
        yield [whole.write([3], 2)]

    assert run(script).error is None
    model = make_model(ALONE)
    (line,) = [script_line(model, 9)]
    assert found == [line[4:6], line[4:7], line[4:9]]


def script_line(model, count):
    """What follows range(6)."""

    def script(root, request):
        yield [root.write(range(6), count)]
        return root.new

    tokens = run(script, model).tokens
    check_greedy(model, range(6), tokens, 40)
    return tokens


def test_workers_that_see_each_other_against_numpy():
    model = make_model(ALONE)
    prompt, headers, counts = [5, 6, 7, 8, 9], {"a": [1, 2, 3], "b": [4]}, {"a": 14, "b": 9}
    found = {}

    def script(root, request):
        a, b = root.fork(2)
        a.sees, b.sees = [root, b], [root, a]
        yield [root.write(prompt)]
        workers = {"a": a, "b": b}
        yield [w.write(headers[name], counts[name]) for name, w in workers.items()]
        found.update({name: w.new for name, w in workers.items()})

    def beside(root, request):
        yield [root.write([3] * 20, 40)]

    engine = Engine(model, **SIZES)
    numbers = [engine.submit(Request([1], 1, layout=layout)) for layout in (beside, script)]
    results = engine.run()
    assert all(results[number].error is None for number in numbers)

    reference = Reference(model)
    sees = {"root": [], "a": ["root", "b"], "b": ["root", "a"]}
    reference.texts = {name: [] for name in sees}
    for token in prompt:
        reference.read({"root": token}, sees)
    new = {"a": [], "b": []}
    for name, header in headers.items():
        for token in header:
            last = reference.read({name: token}, sees)[name]
        new[name].append(last)
    while going := {name: new[name][-1] for name in new if len(new[name]) < counts[name]}:
        for name, token in reference.read(going, sees).items():
            new[name].append(token)
    assert found == new


def test_one_worker_alone_writes_as_plain_decoding_does():
    def script(root, request):
        (worker,) = root.fork()
        worker.sees = [root]
        yield [root.write(range(7))]
        yield [worker.write([2, 3], 12)]
        return worker.new

    tokens = run(script).tokens
    check_greedy(make_model(ALONE), [*range(7), 2, 3], tokens, 40)


def test_a_text_that_is_moved_with_what_follows_it_goes_on_as_before():
    def script(root, request):
        yield [root.write(range(7))]
        root.move(100)
        root.position += 100
        yield [root.write([2, 3], 8)]
        return root.new

    check_greedy(make_model(ALONE), [*range(7), 2, 3], run(script).tokens, 40)


def test_a_text_that_another_takes_over_is_read_as_if_it_stood_there():
    def script(root, request):
        a, b = root.fork(2)
        a.sees = b.sees = [root]
        yield [root.write(range(7))]
        yield [a.write([2, 3], 6)]
        yield [a.write()]
        root.take(a)
        yield [b.write([4], 8)]
        return [*a.new, *b.new]

    tokens = run(script).tokens
    # Positions, and what is seen, are those of one line.
    line = [*range(7), 2, 3, *tokens[:6], 4]
    check_greedy(make_model(ALONE), [*range(7), 2, 3], tokens[:6], 40)
    check_greedy(make_model(ALONE), line, tokens[6:], 40)


def marked(branch, mark):
    branch.mark = mark
    return branch


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda root, _: join([]), "a join of no branch"),
        (lambda root, _: join([root, root]), "a join of branches 0, 0: expected each once"),
        (lambda root, other: join([root, other]), "a join of branches of several requests"),
        (lambda root, _: (root.drop(), join([root])), "join of branch 0, which was dropped"),
        (lambda root, _: (root.drop(), root.fork()), "fork of branch 0, which was dropped"),
        (lambda root, _: root.fork(0), "a fork into 0 branches"),
        (lambda root, _: root.part(0), "part 0 of a view: expected 1 or more"),
        (lambda root, _: root.part(1, 0.0), "temperature=0.0 of part 1"),
        (lambda root, _: (join([root]), root.move(1)), "move of branch 0, from which branch 1"),
        (lambda root, _: (join([root]), root.part(1)), "part of branch 0, from which branch 1"),
        (lambda root, _: (join([b := root.fork()[0]]), root.take(b)), "take of branch 1, from"),
        (lambda root, _: [root.write(), root.write()], "branches [0, 0] at once"),
        (lambda root, _: [root.write([31])], "the write to branch 0 has token id 31"),
        (lambda root, _: [root.write([1], -1)], "generates -1 tokens"),
        (lambda root, _: [root.write([1], 2045)], "from position 3 to 2049, but the model's max"),
        (lambda root, _: [marked(root, 4).write([1])], "marked 4, but the model has branches=3"),
        (lambda root, _: [marked(root, -1).write([1])], "marked -1, but the model has"),
        (lambda root, other: [other.write([1])], "is to a branch of another request"),
        (lambda root, _: [root.write([1], 2, shared=True)], "generate by another write"),
        (lambda root, _: Race([p.write([1], 2) for p in root.fork(5)]), "has rows for 4"),
        (lambda root, _: None, "its layout yields None: expected a list"),
        (lambda root, _: [], "its layout yields []"),
        (lambda root, _: [3], "yields a list with 3"),
        (lambda root, _: 1 / 0, "its layout raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_script_that_goes_wrong_fails_alone(wrong, message):
    engine = Engine(make_model(ALONE), **SIZES)
    roots = []

    def other(root, request):
        roots.append(root)
        yield [root.write([1, 2, 3], 5)]
        yield [root.write([1], 5)]
        return root.new

    def script(root, request):
        yield [root.write([1, 2, 3])]
        yield wrong(root, roots[0])

    numbers = [engine.submit(Request([1], 1, layout=layout)) for layout in (other, script, other)]
    results = engine.run()
    assert isinstance(results[1].error, InputError)
    assert str(results[1].error).startswith("request 1: ")
    assert message in str(results[1].error)
    assert results[1].ledger.written == 3
    assert results[0].tokens == results[2].tokens
    assert len(results[0].tokens) == 5
    assert len(numbers) == 3
    assert engine.memory.held == engine.memory.promised == 0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda root: join(root.fork(2)),
        lambda root: root.move(3),
        lambda root: root.part(1),
        lambda root: setattr(root, "sees", root.fork()),
        lambda root: setattr(root, "position", 5),
    ],
)
def test_what_a_recurrence_cannot_do_is_refused_by_name(wrong):
    def script(root, request):
        yield [root.write([1, 2])]
        wrong(root)
        yield [root.write([1])]

    error = str(run(script, make_model(RECURRENT)).error)
    assert "mixers=retention,window" in error
    assert "for attention alone" in error


def test_a_first_stream_that_cannot_be_computed_alone_is_refused_by_name():
    engine = Engine(make_model(dataclasses.replace(SMALL, transform="soft_tokens")), **SIZES)
    numbers = [
        engine.submit(Request([1, 2, 3], 4, layout=layout)) for layout in (plain, shared_prompt)
    ]
    results = engine.run()
    assert len(results[numbers[0]].tokens) == 4
    assert "transform=soft_tokens: the first stream" in str(results[numbers[1]].error)


@pytest.mark.parametrize("layout", [lambda *_: [1], lambda *_: None, lambda *_: 1 / 0, lambda: 1])
def test_layouts_that_are_no_scripts(layout):
    error = run(layout).error
    assert isinstance(error, InputError)
    assert str(error).startswith("request 0: its layout ")
