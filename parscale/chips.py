"""Accelerators as a cost model sees them: operations per second, memory, bandwidth."""

import dataclasses

from sharding.settings import InputError, nearest

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      name: what people call it.
      flops: peak operations per second of matrix products in bfloat16, without sparsity.
      memory: bytes of its main memory.
      bandwidth: bytes per second between main memory and chip.
      ici: bytes per second that a TPU chip sends to its neighbours, over all links together; as
        many come in. None: not a TPU.
      dcn: bytes per second of a TPU chip's share of the data-centre network. None: not published.
    """

    name: str
    flops: float
    memory: int
    bandwidth: float
    ici: float | None = None
    dcn: float | None = None

    def derated(self, flops_efficiency: float, bandwidth_efficiency: float) -> "Chip":
        """The same chip when only these shares (0 to 1) of its peak rates are reached."""
        for name, share in (("flops", flops_efficiency), ("bandwidth", bandwidth_efficiency)):
            if not 0 < share <= 1:
                raise InputError(f"{name}_efficiency={share}: expected more than 0, at most 1")
        return dataclasses.replace(
            self,
            flops=self.flops * flops_efficiency,
            bandwidth=self.bandwidth * bandwidth_efficiency,
        )


# NVIDIA's data sheets of the A100 80GB, H100 and H200 in their SXM form (half of the figures with
# sparsity), and the pages v4, v5e, v5p, v6e, tpu7x below docs.cloud.google.com/tpu/docs. A "GB" of
# memory on these pages is 2**30 bytes, one of bandwidth 10**9. They give the interconnect in both
# directions together, of which half is taken; that of v4 is from the paper on it (arXiv 2304.01433:
# 6 links of 50 GB/s). The network is given for a chip or, of v5e, for a pod of 256.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("A100", 312e12, 80 * GiB, 2039e9),
        Chip("H100", 989e12, 80 * GiB, 3350e9),
        Chip("H200", 989e12, 141 * GiB, 4800e9),
        Chip("v4", 275e12, 32 * GiB, 1200e9, 300e9),
        Chip("v5e", 197e12, 16 * GiB, 819e9, 200e9, 3.125e9),
        Chip("v5p", 459e12, 95 * GiB, 2765e9, 600e9, 6.25e9),
        Chip("v6e", 918e12, 32 * GiB, 1638e9, 400e9, 12.5e9),
        Chip("tpu7x", 2307e12, 192 * GiB, 7380e9, 600e9, 12.5e9),
    )
}


def find_chip(name: str) -> Chip:
    """The chip of this name, in capitals or not.

    Raises:
      InputError: there is none.
    """
    known = {known.lower(): chip for known, chip in CHIPS.items()}
    if name.lower() not in known:
        # The nearest is sought without regard to capitals, and told with its own.
        guess = nearest(name.lower(), known)
        for lower, chip in known.items():
            guess = guess.replace(f'"{lower}"', f'"{chip.name}"')
        raise InputError(f"chip={name}: expected one of {', '.join(CHIPS)}{guess}")
    return known[name.lower()]
