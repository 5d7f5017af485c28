"""Texts that fork and join, decoded branch by branch over blocks that the branches share."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from models.block_cache import View, with_states
from models.segments import Layout, Segment
from models.transformer import LanguageModel

SLOTS, ROWS, CHUNK = 4, 4, 3  # slots of a block, branches decoded at once, tokens in a prefill
HELD = 36  # blocks of a view at most
ROW = 80  # tokens of a whole text at most


def random_text(rng: np.random.Generator, vocab: int, depth: int = 3) -> list[Segment]:
    """A fork and join whose branches fork and join again, at least one of them `depth` deep."""
    segments: list[Segment] = []

    def add(after, least=0):
        tokens = rng.integers(0, vocab, rng.integers(least, 5))
        segments.append(Segment(tuple(map(int, tokens)), after))
        return len(segments) - 1

    def grow(start, depth, surely):
        end = add((start,) if start is not None else (), least=start is None)
        if depth and (surely or rng.random() < 0.3):
            branches = range(rng.integers(2, 4))
            end = add(tuple(grow(end, depth - 1, surely and not i) for i in branches))
        return end

    grow(None, depth, True)
    add((len(segments) - 1,), least=1)
    return segments


def whole(
    model: LanguageModel, layout: Layout, marks: np.ndarray | None
) -> Float[np.ndarray, "T P D"]:
    """Each stream's output for the whole text in one pass, under the mask of its branches."""
    length = len(layout.ids)
    assert length <= ROW
    pad = lambda x: np.pad(x, (0, ROW - length))[None]
    runs = layout.runs
    runs = np.pad(runs, ((0, 16 - len(runs)), (0, 0), (0, ROW - length)))
    mask = dataclasses.replace(layout.mask, intervals=runs, queries=ROW)
    arguments = {"positions": pad(layout.positions), "mask": mask}
    if marks is not None:
        arguments["branches"] = pad(marks)
    x, _ = _run(*nnx.split(model), pad(layout.ids), arguments)
    return np.moveaxis(np.asarray(x[0]), 0, 1)[:length]


@dataclasses.dataclass
class Written:
    """What a segment's last token sees, and where a token after it may go."""

    counts: dict[int, int]  # slots seen of each block of all streams, by its name
    tail: int | None = None  # the block to go on in

    def follow(self) -> "Written":
        """To go on from here: the first that does so takes what is left of the last block."""
        tail, self.tail = self.tail, None
        return Written(dict(self.counts), tail)


class Decoder:
    """Writes segments in rows, as many side by side as there are, and keeps their outputs.

    A block here stands for one block of each stream, whose numbers are drawn at random.
    """

    def __init__(self, model: LanguageModel, rng: np.random.Generator, blocks: int = 96):
        self.graph, self.params = nnx.split(model)
        streams = model.config.streams
        self.numbers = 1 + rng.permutation(blocks * streams).reshape(blocks, streams)
        self.rng, self.used, self.shape = rng, 0, (ROWS, streams)
        pools = model.init_blocks(blocks * streams + 1, SLOTS)
        self.cache = with_states(pools, model.init_states(ROWS))
        self.soft: dict[int, int] = {}
        if model.soft_length:
            soft = Written({})
            places = np.stack([self.place(soft) for _ in range(model.soft_length)], -1)[None]
            empty = np.zeros((1, streams, 0), np.int32)
            view = View(empty, empty, places.astype(np.int32))
            self.cache = model.write_soft_tokens(self.cache, view)
            self.soft = soft.counts

    def place(self, written: Written) -> np.ndarray:
        """The place `[P]` of the next token, which counts as written from now on."""
        if written.tail is None or written.counts[written.tail] == SLOTS:
            written.tail, self.used = self.used, self.used + 1
            written.counts[written.tail] = 0
        slot = written.counts[written.tail]
        written.counts[written.tail] += 1
        return self.numbers[written.tail] * SLOTS + slot

    def decode(self, layout: Layout, marks: np.ndarray | None) -> Float[np.ndarray, "T P D"]:
        """Each stream's output for each token of a text."""
        self.layout, self.marks = layout, marks
        self.outputs: list = [None] * len(layout.ids)
        written: dict[int, Written] = {}
        waiting = list(range(len(layout.description)))
        while waiting:
            ready = [n for n in waiting if written.keys() >= set(layout.description[n].after)]
            ready = ready[:ROWS]
            for number in ready:
                waiting.remove(number)
                after = [written[other] for other in layout.description[number].after]
                if len(after) == 1:
                    written[number] = after[0].follow()
                else:
                    counts = dict(self.soft)
                    for other in after:
                        for block, count in other.counts.items():
                            counts[block] = max(count, counts.get(block, 0))
                    written[number] = Written(counts)
            self.write({number: written[number] for number in ready})
        return np.stack(self.outputs)

    def write(self, branches: dict[int, Written]) -> None:
        """All tokens of some segments, the first ones now and then several in a pass."""
        tokens = {n: list(np.flatnonzero(self.layout.segments == n)) for n in branches}
        chunk = int(self.rng.choice([1, CHUNK]))
        while any(tokens.values()):
            self.run(chunk, branches, {n: left[:chunk] for n, left in tokens.items()})
            tokens = {n: left[chunk:] for n, left in tokens.items()}
            chunk = 1

    def run(self, length: int, branches: dict[int, Written], tokens: dict[int, list[int]]) -> None:
        """One pass; rows without a token, and tokens behind a row's last, are padding."""
        ids, positions, marks = np.zeros((3, ROWS, length), np.int32)
        blocks, counts = np.zeros((2, *self.shape, HELD), np.int32)
        places = np.zeros((*self.shape, length), np.int32)
        rows = list(zip(self.rng.permutation(ROWS), branches, strict=False))
        for row, number in rows:
            held, now = branches[number], tokens[number]
            before = dict(held.counts)
            for i, token in enumerate(now):
                places[row, :, i] = self.place(held)
                ids[row, i] = self.layout.ids[token]
                positions[row, i] = self.layout.positions[token]
                marks[row, i] = 0 if self.marks is None else self.marks[token]
            names = list(self.rng.permutation(list(held.counts)))
            blocks[row, :, : len(names)] = self.numbers[names].T
            counts[row, :, : len(names)] = [before.get(name, 0) for name in names]
        arguments = {"positions": positions, "view": View(blocks, counts, places)}
        if self.marks is not None:
            arguments["branches"] = marks
        x, self.cache = _run(self.graph, self.params, ids, arguments | {"cache": self.cache})
        x = np.asarray(x)
        for row, number in rows:
            for i, token in enumerate(tokens[number]):
                self.outputs[token] = x[row, :, i]


@functools.partial(jax.jit, static_argnames="graph")
def _run(graph, params, ids, arguments):
    return nnx.merge(graph, params).run_streams(ids, **arguments)
