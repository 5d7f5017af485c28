"""Scripts that fork, join, race and see each other, against one pass under the mask of the text."""

import dataclasses

import numpy as np
import pytest
from engine_models import SMALL, check_best, check_greedy, logits_of, make_model

from models.segments import Segment, lay_out
from parscale.branches import Race, join
from parscale.engine import Engine, Request
from sharding.settings import InputError

pytestmark = pytest.mark.usefixtures("little_optimization")

ROW = 160  # tokens of a whole text at most


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
        ends, starts = {}, {}
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
    engine = Engine(model, **{"cache_tokens": 4096, "slots": 8, "rows": 4} | engine)
    numbers = [engine.submit(Request([1], 1, layout=writer)) for writer in writers]
    results = engine.run()
    for number, writer in zip(numbers, writers, strict=True):
        assert results[number].error is None, results[number].error
        assert results[number].ledger.generated == sum(piece.most for piece in writer.pieces)
        check_text(model, writer.pieces, writer.tokens)
    assert engine.memory.held == engine.memory.promised == 0
    return engine


def test_random_texts_that_fork_and_join():
    write_texts(make_model(dataclasses.replace(SMALL, branches=3)), 4, 0)
