"""Compiles a program for a pod of TPUs that is not there, and says what it needs on each chip.

The compiler is libtpu's own, so memory is what it will be; no time is measured. What is compiled is
any function that was lowered for a mesh of `pod_mesh`, with abstract arguments:

    mesh = pod_mesh(parse_topology("v5e:16x16"), MeshConfig(fsdp=64, stream=4))
    with jax.set_mesh(mesh), dispatch.compiling_for("tpu"):
        lowered = jax.jit(step).lower(state, batch)
    needs = compile_lowered(lowered, mesh)
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import tempfile
import time
import typing
from collections.abc import Iterator
from contextlib import contextmanager

from sharding.mesh import MeshConfig, make_mesh, mesh_shape
from sharding.pods.topologies import Topology

if typing.TYPE_CHECKING:
    from jax.sharding import Mesh
    from jax.stages import Lowered

    from sharding.pods.hlo import Work

# A "windowed einsum" overlaps a product with the gathering of its operand piece by piece. On the
# fsdp axis the pieces are so narrow that adding up their products takes longer than the gathering
# that is hidden. The threshold, in MiB, is above every weight.
COMPILER_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "100000"}

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_MEMORY = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available \w+ \(([\d.]+)([KMGT]?)\)")
_USED = re.compile(r"Used ([\d.]+)([KMGT]?)(?:i?B)? of ([\d.]+)([KMGT]?)(?:i?B)? \w+")


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """What the compiler is told beside its defaults, for training as for a pod compile."""
    is_tpu = mesh.devices.flat[0].platform == "tpu"
    return dict(COMPILER_OPTIONS) if is_tpu else None


class DoesNotFitError(Exception):
    """The compiler found that a program needs more memory than a chip has.

    Attributes:
      needed, available: bytes; None where the compiler did not say.
    """

    def __init__(self, needed: float | None, available: float | None):
        self.needed, self.available = needed, available
        said = "more memory than a chip has"
        if needed is not None:
            said = f"{needed / 2**30:.2f} GiB on a chip, of which {available / 2**30:.2f} GiB"
            said += " can be used"
        super().__init__(f"the program does not fit: the compiler needs {said}")

    def __reduce__(self):
        return type(self), (self.needed, self.available)


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a compiled program needs of each device (of tpu7x: of half a chip).

    Attributes:
      arguments, outputs: bytes; an output that takes the place of an argument is in both.
      aliased: bytes of such outputs.
      temporaries: bytes of everything else that exists while it runs, at its peak.
      peak: bytes of memory at the peak, the program's own code left out.
      code: bytes of the program.
      seconds: that compiling took.
      work: what its text says.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int
    code: int
    seconds: float
    work: Work


def pod_mesh(topology: Topology, config: MeshConfig) -> Mesh:
    """The mesh over the devices of a topology, which need not be there.

    Raises:
      InputError: no libtpu, a topology it does not know, or sizes that do not multiply to it.
    """
    mesh_shape(config, topology.device_count)
    return make_mesh(config, topology.devices())


def compile_lowered(lowered: Lowered, mesh: Mesh) -> Needs:
    """What a program needs, by compiling it.

    Args:
      lowered: by `jax.jit(...).lower(...)`, with the mesh set.
      mesh: by `pod_mesh`.

    Raises:
      DoesNotFitError: it needs more memory than there is.
    """
    from sharding.pods import hlo

    options = compiler_options(mesh) or {}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # The compiler writes the program down itself: jax cannot print all of v6e and tpu7x.
        options |= {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        with _out_of_memory():
            compiled = lowered.compile(compiler_options=options)
        seconds = time.monotonic() - begin
        text = _written(pathlib.Path(folder))
    slices = len({getattr(device, "slice_index", 0) for device in mesh.devices.flat})
    memory = compiled.memory_analysis()
    temporaries = memory.temp_size_in_bytes
    arguments = memory.argument_size_in_bytes
    outputs, aliased = memory.output_size_in_bytes, memory.alias_size_in_bytes
    return Needs(
        arguments=arguments,
        outputs=outputs,
        aliased=aliased,
        temporaries=temporaries,
        peak=arguments + outputs - aliased + temporaries,
        code=memory.generated_code_size_in_bytes,
        seconds=seconds,
        work=hlo.read(text, dict(mesh.shape), slices),
    )


def _written(folder: pathlib.Path) -> str:
    """The largest of the final programs that the compiler wrote; others are parts of it."""
    found = sorted(folder.glob("*.after_codegen.txt"), key=lambda path: path.stat().st_size)
    if not found:
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise RuntimeError(f"the compiler wrote no program down, but {names}")
    return found[-1].read_text()


@contextmanager
def _out_of_memory() -> Iterator[None]:
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message or "memory" not in message.lower():
            raise
        raise DoesNotFitError(*memory_of(message)) from None


def memory_of(message: str) -> tuple[float | None, float | None]:
    """Bytes that the compiler's out-of-memory message says it needs, and those there are."""
    found = _MEMORY.search(message) or _USED.search(message)
    if not found:
        return None, None
    needed, unit, available, other = found.groups()
    return float(needed) * _UNITS[unit], float(available) * _UNITS[other]
