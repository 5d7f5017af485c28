"""What the engine's passes are made of: rows as arrays, for the models of one number of streams."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.block_cache import View
from models.growth import first_stream
from models.transformer import LanguageModel
from parscale import engine_steps
from parscale.block_memory import BlockMemory
from parscale.branches import Branch, Entry
from parscale.engine_steps import NO_TOKEN, Rows, Seen, Tokens
from parscale.sampling import GREEDY, as_arrays
from sharding import rules

if TYPE_CHECKING:
    from parscale.engine_jobs import Job

# What steps are compiled for are numbers up to a power of 2 from these on: rows, tokens of a row
# (or a single one), blocks of a view (or none), ends of a row, parts; when tokens are written, up
# to a power of 4 of rows and blocks. With 16 rows and texts of 2048 tokens in blocks of 16 this is
# at most 168 steps that write (3 rows, 7 tokens, 4 blocks, greedy or not) and 50 that generate.
# On CPU every compiled step takes some 240 of the 65530 memory maps that Linux grants a process.
FEWEST_ROWS, FEWEST_TOKENS, FEWEST_BLOCKS, FEWEST_ENDS, FEWEST_PARTS = 1, 16, 8, 4, 2


@dataclasses.dataclass
class Text:
    """Where a branch stands before a pass: what it sees, and where its next token goes.

    Attributes:
      entries: of the cache, those of its own text last.
      tail: the place in `entries` of the block that the next token goes to.
      filled: slots of that block that are full.
      place: of a branch that sees others, the position of the next token and that of its key.
    """

    entries: list[Entry]
    tail: int
    filled: int
    place: tuple[int, int] | None


class Group:
    """The model of one number of streams, and the rows that generate with it."""

    def __init__(self, model: LanguageModel, rows: int, memory: BlockMemory, slots: int):
        self.config = model.config
        self.memory, self.slots = memory, slots
        unrolled = jax.default_backend() == "cpu" and model.config.layer_loop != "scan"
        self.model = model.unstack() if unrolled else model
        self._whole = _split(self.model)
        self._first_stream: tuple | None = None
        _, self._generate = engine_steps.of_graph(self._whole[0])
        self._row_parts = rules.parts("batch")
        self._stream_parts = rules.parts("streams")
        self._rows: list[Job | None] = [None] * rows
        self.rows_of_part = rows // self._row_parts
        parts = [self.stream_parts(part) for part in range(self._row_parts)]
        self._padding = np.array([list(map(memory.nobodys, part)) for part in parts], np.int32)
        self.soft_entries: list[list[Entry]] = [[] for _ in range(self._row_parts)]
        self.first_states = engine_steps.new_states(*self._whole, 1)
        self._states = engine_steps.new_states(*self._whole, rows)
        self._axis = self.model.state_axis
        self._has_states = bool(jax.tree.leaves(self._states))
        self.has_blocks = "attention" in self.config.mixers

    def stream_parts(self, row_part: int) -> tuple[int, ...]:
        """For each stream of a row the part of the cache that its blocks are in."""
        streams = self.config.streams
        first = row_part * self._stream_parts
        return tuple(first + p * self._stream_parts // streams for p in range(streams))

    def new_pools(self, blocks: int) -> tuple:
        """A cache of so many blocks, with nothing in them."""
        return engine_steps.new_pools(*self._whole, blocks, self.slots)

    def begin(self, pools: tuple) -> tuple:
        """The cache with what every branch begins with: the soft tokens of the streams."""
        soft = self.model.soft_length
        if not soft:
            return pools
        count = -(-soft // self.slots) if self.has_blocks else 0
        for part, entries in enumerate(self.soft_entries):
            for index in range(count):
                blocks = self.memory.set_aside(self.stream_parts(part))
                entries.append(Entry(blocks, min(self.slots, soft - index * self.slots)))
        shape = (self._row_parts, self.config.streams)
        place = np.arange(soft)
        places = np.zeros((*shape, soft), np.int32)
        if count:
            blocks = np.array([[e.blocks for e in entries] for entries in self.soft_entries])
            places = blocks[:, place // self.slots].swapaxes(1, 2) * self.slots
            places = (places + place % self.slots).astype(np.int32)
        nothing = np.zeros((*shape, 0), np.int32)
        view = View(nothing, nothing, places)
        states = engine_steps.new_states(*self._whole, self._row_parts)
        pools, states = engine_steps.write_soft_tokens(*self._whole, pools, states, view)
        self.first_states = engine_steps.take_states(states, 0, 1, self._axis)
        return pools

    def free_rows(self, part: int) -> list[int]:
        """The rows of a part in which nobody generates."""
        first = part * self.rows_of_part
        rows = range(first, first + self.rows_of_part)
        return [row for row in rows if self._rows[row] is None]

    def seat(self, job: "Job", row: int) -> None:
        """Gives a job a row to generate in."""
        self._rows[row], job.row = job, row
        if self._has_states:
            self._states = engine_steps.put_states(self._states, row, job.branch.states, self._axis)

    def unseat(self, job: "Job") -> None:
        """Takes a job's row back; its branch keeps what the row remembers."""
        if self._has_states:
            job.branch.states = engine_steps.take_states(self._states, job.row, 1, self._axis)
        self._rows[job.row], job.row = None, None

    def shape(self, job: "Job", limit: int) -> tuple[int, bool]:
        """What jobs that are written in one pass have in common: tokens, and who computes them."""
        length = min(job.left, limit)
        return 1 if length == 1 else rounded(length, FEWEST_TOKENS), job.write.shared

    def write(self, pools: tuple, jobs: "Sequence[Job]", limit: int) -> tuple:
        """Writes what one pass takes of jobs of one shape.

        Returns:
          the cache, and pairs of a job that took part and the token chosen after its last one.
        """
        length, shared = self.shape(jobs[0], limit)
        most = max(1, min(len(self._rows), 4 * limit // length) // self._row_parts)
        by_part = [[] for _ in range(self._row_parts)]
        for job in jobs:
            part = by_part[job.active.row_part]
            if len(part) < most:
                part.append(job)
        size = rounded(max(map(len, by_part)), FEWEST_ROWS, 4)
        rows = [job for part in by_part for job in (*part, *[None] * (size - len(part)))]
        taking = [job for job in rows if job]
        counts = {job: min(job.left, limit) for job in taking}
        texts = {job: self._text(job) for job in taking}
        places = {job: self._commit(job.branch, counts[job]) for job in taking if not job.again}
        for job, text in texts.items():
            if length == 1:  # a token sees itself in its block
                text.entries = self._text(job).entries
            else:  # they see each other by the mask
                text.entries = [entry for entry in text.entries if entry.count]
        streams = 1 if shared else self.config.streams
        batch, ids = len(rows), np.zeros((len(rows), length), np.int32)
        lengths, positions = np.ones(batch, np.int32), np.zeros((batch, length), np.int32)
        where = np.zeros((batch, streams, length), np.int32)
        keys, marks, steps = positions.copy(), positions.copy(), np.arange(length)
        where[:] = self._nobodys(batch, streams)[..., None] * self.slots
        texts_of_rows = [texts[job] if job else None for job in rows]
        seen = self._seen(texts_of_rows, rows, streams, factor=4)
        for row, job in enumerate(rows):
            if job is None:
                continue
            count, text = counts[job], texts[job]
            lengths[row] = count
            ids[row, :count], positions[row, :count], marks[row, :count] = job.text[:, :count]
            if text.place is not None:
                start, key_start = (place - job.again for place in text.place)
                positions[row], keys[row] = start + steps, key_start + steps
            else:
                keys[row] = positions[row]
            if not job.again:
                where[row, :, :count] = places[job][:streams]
            if job.again:  # what pads its blocks must not be where it writes
                size = len(text.entries)
                seen.blocks[row, :, size:] = seen.blocks[row, :, :1]
        tokens = Tokens(
            ids, lengths, positions,
            keys if (keys != positions).any() else None,
            marks if self.config.branches else None,
            where,
        )  # fmt: skip
        choice, method = as_arrays([_sampling(job) for job in rows], batch)
        if not any(job.most and job.left == counts[job] for job in taking):
            method = "greedy"
        states = self._gather_states(rows)
        graph, params = self.first() if shared else self._whole
        step, _ = engine_steps.of_graph(graph)
        new, pools, states = step(params, pools, states, tokens, seen, choice, method=method)
        new, done = np.asarray(new), []
        for row, job in enumerate(rows):
            if job is None:
                continue
            job.text = job.text[:, counts[job] :]
            if self._has_states:
                job.branch.states = engine_steps.take_states(states, row, 1, self._axis)
            done.append((job, int(new[row])))
        return pools, done

    def generate(self, pools: tuple, jobs: "Sequence[Job]", steps: int) -> tuple:
        """Up to `steps` tokens of jobs that have rows and room for them.

        Returns:
          the cache, and the new tokens of each job, at least one.
        """
        batch = len(self._rows)
        if self._row_parts == 1:
            batch = min(batch, rounded(max(job.row for job in jobs) + 1, FEWEST_ROWS))
        streams = self.config.streams
        rows: list[Job | None] = [None] * batch
        for job in jobs:
            rows[job.row] = job
        if steps == 1:  # those who see each other see what is written in this step
            for job in jobs:
                self._commit(job.branch, 1)
        texts = [job and self._text(job, counted=int(steps == 1)) for job in rows]
        token, most = np.zeros(batch, np.int32), np.zeros(batch, np.int32)
        positions, keys, marks = (np.zeros(batch, np.int32) for _ in range(3))
        tail, filled = np.zeros(batch, np.int32), np.zeros(batch, np.int32)
        # A row may stop at a token that could end a run, and go on if it does not.
        ends = {job: sorted({end[-1] for end in job.write.until}) for job in jobs}
        widest = max(map(len, ends.values()))
        until = np.full((batch, rounded(widest, FEWEST_ENDS)), NO_TOKEN, np.int32)
        races, first_of = np.arange(batch, dtype=np.int32), {}
        for job in jobs:
            row, text = job.row, texts[job.row]
            token[row], position, marks[row] = job.branch.pending
            positions[row], keys[row] = text.place or (position, position)
            most[row] = job.most
            tail[row], filled[row] = text.tail, text.filled
            until[row, : len(ends[job])] = ends[job]
            if job.active.race:
                races[row] = first_of.setdefault(job.active.number, row)
        values = Rows(
            token, positions,
            keys if (keys != positions).any() else None,
            marks if self.config.branches else None,
            tail, filled, self._nobodys(batch, streams), most, until,
            races,
        )  # fmt: skip
        seen = self._seen(texts, rows, streams)
        choice, method = as_arrays([_sampling(job) for job in rows], batch)
        states, some = self._states, self._has_states and batch < len(self._rows)
        if some:
            states = engine_steps.take_states(states, 0, batch, self._axis)
        new, pools, states = self._generate(
            self._whole[1], pools, states, values, seen, choice, steps=steps, method=method
        )
        self._states = (
            engine_steps.put_states(self._states, 0, states, self._axis) if some else states
        )
        new, results = np.asarray(new), []
        for job in jobs:
            tokens = [int(token) for token in new[job.row] if token != NO_TOKEN]
            if steps > 1:
                self._commit(job.branch, len(tokens))
            results.append(tokens)
        return pools, results

    def _text(self, job: "Job", counted: int = 0) -> Text:
        """Where a job's branch stands; of its spare blocks all are at the end of what it sees.

        Args:
          job: which.
          counted: tokens of the pass, 0 or 1, that count as written already.
        """
        branch, offset = job.branch, 0
        entries = list(self.soft_entries[job.active.row_part])
        for other in branch.sees or ():
            entries += [_moved(entry, offset) for entry in other.entries]
            offset += other.length
        filled = branch.entries[-1].count - counted if branch.grows else self.slots
        full = filled == self.slots
        tail = len(entries) + len(branch.entries) - (not full)
        filled = 0 if full else filled
        entries += [_moved(entry, offset) for entry in branch.entries]
        if branch.grows:  # as it is before the pass
            entries[-1] = dataclasses.replace(entries[-1])
        entries += [Entry(blocks, 0, offset) for blocks in branch.spare]
        if branch.sees is None:
            return Text(entries, tail, filled, None)
        own = branch.length - counted
        return Text(entries, tail, filled, (offset + own, own))

    def _commit(self, branch: Branch, count: int) -> np.ndarray:
        """Counts `count` more tokens as written; their places `[P, count]`."""
        if not self.has_blocks:
            return np.zeros((self.config.streams, count), np.int32)
        places, left = [], count
        while left:
            if not branch.grows or branch.entries[-1].count == self.slots:
                branch.entries.append(Entry(branch.spare.pop(0), 0))
                branch.grows = True
            entry = branch.entries[-1]
            taken = min(left, self.slots - entry.count)
            slot = entry.count + np.arange(taken)
            places.append(np.array(entry.blocks)[:, None] * self.slots + slot)
            entry.count += taken
            left -= taken
        return np.concatenate(places, 1)

    def _seen(
        self,
        texts: Sequence[Text | None],
        rows: "Sequence[Job | None]",
        streams: int,
        factor: int = 2,
    ) -> Seen:
        batch = len(texts)
        most = max(len(text.entries) for text in texts if text)
        most = rounded(most, FEWEST_BLOCKS, factor) if most else 0
        blocks = np.repeat(self._nobodys(batch, streams)[..., None], most, -1)
        counts, shifts, parts = (np.zeros((batch, most), np.int32) for _ in range(3))
        for row, text in enumerate(texts):
            if text is None or not text.entries:
                continue
            size = len(text.entries)
            blocks[row, :, :size] = np.array([e.blocks for e in text.entries]).T[:streams]
            counts[row, :size] = [entry.count for entry in text.entries]
            shifts[row, :size] = [entry.shift for entry in text.entries]
            parts[row, :size] = [entry.part for entry in text.entries]
        shifts = shifts if shifts.any() else None
        if not parts.any():
            return Seen(blocks, counts, shifts)
        width = rounded(1 + int(parts.max()), FEWEST_PARTS)
        values = []
        for name in ("temperatures", "factors"):
            value = np.ones((batch, width), np.float32)
            for row, job in enumerate(rows):
                given = getattr(job.branch, name) if job else ()
                value[row, : len(given)] = given[:width]
            values.append(value)
        return Seen(blocks, counts, shifts, parts, *values)

    def _nobodys(self, batch: int, streams: int) -> np.ndarray:
        """For each stream of each row the block that belongs to nobody, int32 `[B, P]`."""
        return np.repeat(self._padding[:, :streams], batch // self._row_parts, 0)

    def first(self) -> tuple[nnx.GraphDef, Any]:
        """The graph and the weights of what computes the first stream alone.

        Raises:
          InputError: there is no such model (`models.growth.first_stream`).
        """
        if self._first_stream is None:
            self._first_stream = _split(first_stream(self.model))
        return self._first_stream

    def _gather_states(self, rows: "Sequence[Job | None]") -> tuple:
        """The states of the branches of rows."""
        if not self._has_states:
            return self._states
        every = [self.first_states if job is None else job.branch.states for job in rows]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, self._axis), *every)


def rounded(count: int, least: int, factor: int = 2) -> int:
    """`count` up to `least` times a power of `factor`."""
    size = least
    while size < count:
        size *= factor
    return size


def _split(model: LanguageModel) -> tuple[nnx.GraphDef, Any]:
    graph, params = nnx.split(model)
    return graph, nnx.to_pure_dict(params)


def _moved(entry: Entry, by: int) -> Entry:
    return dataclasses.replace(entry, shift=entry.shift + by) if by else entry


def _sampling(job: "Job | None") -> tuple:
    return (GREEDY, 0) if job is None else (job.active.request.sampling, job.branch.number)
