"""Which blocks of a cache are free, who holds the others, and how many are promised."""

from collections.abc import Sequence

from sharding.settings import InputError


class OutOfBlocksError(Exception):
    """No block is free now; one may be later."""


class BlockMemory:
    """Counts of holders for the blocks of a cache.

    The blocks are in equal ranges, one for each part of the devices; the first of each range is
    nobody's. A request is promised as many as it will surely need before it begins, so that those
    that run can always end.
    """

    def __init__(self, blocks: int, parts: int = 1):
        """`blocks` of each of `parts` ranges, the one that is nobody's among them."""
        self.blocks, self.parts = blocks, parts
        self._free = [
            list(range((part + 1) * blocks - 1, part * blocks, -1)) for part in range(parts)
        ]
        self._promised = [0] * parts
        self._most = [blocks - 1] * parts
        self._holders: dict[int, int] = {}

    @property
    def held(self) -> int:
        """Blocks that somebody holds and may release."""
        return len(self._holders)

    @property
    def promised(self) -> int:
        """Blocks that are kept back for somebody."""
        return sum(self._promised)

    def most(self, parts: Sequence[int]) -> int:
        """How many blocks of each of `parts`, named as often as it is meant, could ever be held."""
        return min(self._most[part] // parts.count(part) for part in set(parts))

    def nobodys(self, part: int) -> int:
        """The block of a range that padding is written to."""
        return part * self.blocks

    def set_aside(self, parts: Sequence[int]) -> tuple[int, ...]:
        """A block of each of `parts`, for good.

        Raises:
          InputError: there is none.
        """
        if not self.can_promise(parts, 1):
            raise InputError(
                f"the cache has {self.blocks - 1} blocks for each part of the devices, less than "
                "what stands before every text: give it more tokens"
            )
        for part in parts:
            self._most[part] -= 1
        return tuple(self._free[part].pop() for part in parts)

    def can_promise(self, parts: Sequence[int], count: int) -> bool:
        """Whether `count` blocks are left for each of `parts`, named as often as it is meant."""
        return all(
            len(self._free[part]) - self._promised[part] >= count * parts.count(part)
            for part in set(parts)
        )

    def promise(self, parts: Sequence[int], count: int) -> None:
        """Keeps `count` blocks back for each of `parts`."""
        for part in parts:
            self._promised[part] += count

    def take_back(self, parts: Sequence[int], count: int) -> None:
        """The end of a promise, kept or not."""
        self.promise(parts, -count)

    def allocate(self, parts: Sequence[int], *, promised: bool) -> tuple[int, ...]:
        """A free block of each of `parts`, now held once.

        Args:
          parts: ranges, one for each block.
          promised: whether they are of a promise that was taken back for them.

        Raises:
          OutOfBlocksError: there are none but those promised to others.
        """
        if not promised and not self.can_promise(parts, 1):
            raise OutOfBlocksError
        blocks = tuple(self._free[part].pop() for part in parts)
        self._holders.update(dict.fromkeys(blocks, 1))
        return blocks

    def hold(self, blocks: Sequence[int]) -> None:
        """One more holder for each of these blocks."""
        for block in set(blocks):
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less; a block without any is free."""
        for block in set(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                self._free[block // self.blocks].append(block)
