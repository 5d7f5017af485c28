"""A training or decoding step compiled for a pod of TPUs: what it needs and how fast it could be.

The bound is a roofline: no step is faster than the slowest of computing (matrix products outside of
kernels, as the compiled program has them, and those of the kernels by formula), of reading every
argument and writing every output once, of what a chip receives from its neighbours over all its
links together, and of what it sends through the data-centre network. Counting that all of it
overlaps gives a least time; that nothing does, the sum. Not counted are elementwise work, reading
and writing of temporaries, latencies, and links that a mesh axis does not use: what a chip reaches
is below the bound.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import WindowCache
from models.block_cache import BlockPool
from models.config import ATTENTION, ModelConfig
from models.transformer import LanguageModel
from models.weights import abstract_weights
from pallas_kernels import dispatch
from parscale import engine_steps, flops
from parscale.chips import Chip, find_chip
from parscale.config import Config
from parscale.engine import SLOTS
from parscale.engine_steps import Rows, Seen
from parscale.sampling import Choice
from parscale.training import Training
from sharding import rules
from sharding.pods.compilation import Needs, compile_lowered, pod_mesh
from sharding.pods.topologies import Topology

CLOCKS = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
"""Cycles per second: a chip's peak over the products that its matrix units make in a cycle."""

BACKWARD_PRODUCTS = 3.5
"""Products of an attention kernel's backward pass over those of its forward pass: 7 over 2."""


@dataclasses.dataclass(frozen=True)
class Decode:
    """A decoding step, instead of one of training.

    Attributes:
      rows: decoded at a time, over all devices [B].
      length: slots of the cache [S].
    """

    rows: int
    length: int


@dataclasses.dataclass(frozen=True)
class PodStep:
    """A step on each device of a pod: of a chip, but of half a chip on tpu7x.

    Attributes:
      topology, config: what was compiled; of the mesh no size is -1.
      devices: of the topology.
      chip: its rates.
      needs: what the compiler says.
      parameters, optimizer, cache: bytes of these arguments.
      kernel_flops: of the kernels, by formula, recomputation included.
      model_flops: that the model needs, without recomputation and what masks leave out.
    """

    topology: Topology
    config: Config
    devices: int
    chip: Chip
    needs: Needs
    parameters: int
    optimizer: int
    cache: int
    kernel_flops: float
    model_flops: float

    @property
    def seconds(self) -> dict[str, float]:
        """Least time of each resource; `dcn` infinite where its rate is not published."""
        work, needs, chip = self.needs.work, self.needs, self.chip
        times = {"memory": (needs.arguments + needs.outputs) / chip.bandwidth}
        ici = sum(found.traffic for found in work.collectives if not found.is_dcn)
        dcn = sum(found.traffic for found in work.collectives if found.is_dcn)
        return times | {
            "compute": (work.flops + self.kernel_flops) / chip.flops,
            "ici": ici / chip.ici,
            "dcn": dcn / (chip.dcn or 0) if dcn and chip.dcn else math.inf if dcn else 0.0,
        }

    @property
    def bound(self) -> float:
        """Seconds that a step takes at the least, if everything overlaps."""
        return max(self.seconds.values())

    @property
    def mfu_bound(self) -> float:
        """The largest share of the chip's peak that the model's operations can reach."""
        return self.model_flops / self.chip.flops / self.bound

    @property
    def compiler_seconds(self) -> float | None:
        """The compiler's estimate of all but kernels and communication; None: no clock known."""
        clock = CLOCKS.get(self.chip.name)
        return self.needs.work.cycles / clock if clock else None


def compile_step(config: Config, topology: Topology, decode: Decode | None = None) -> PodStep:
    """Compiles a step for a pod.

    Args:
      config: of the run; its layers are scanned over unless it says otherwise.
      topology: the pod.
      decode: if given, the step decodes; the configuration's data are then without meaning.

    Raises:
      InputError: no libtpu, or mesh, topology, model and batch do not go together.
      DoesNotFitError: it does not fit.
    """
    mesh = pod_mesh(topology, config.mesh)
    loop = config.model.layer_loop
    model = dataclasses.replace(config.model, layer_loop="scan" if loop == "auto" else loop)
    sizes = dataclasses.replace(config.mesh, **dict(mesh.shape))
    config = dataclasses.replace(config, model=model, mesh=sizes)
    with dispatch.compiling_for("tpu"):
        if decode is None:
            lowered, parts = _train(config, mesh)
        else:
            lowered, parts = _decode(config.model, mesh, decode)
    needs = compile_lowered(lowered, mesh)
    kernels = bool(needs.work.kernels)
    chip = find_chip(topology.chip)
    per_chip = mesh.size // topology.chips
    if per_chip > 1:
        chip = _half(chip, per_chip)
    if decode is None:
        mixing, model_flops = _train_flops(config)
    else:
        mixing, model_flops = 0.0, _decode_flops(config.model, decode)
    return PodStep(
        topology=topology,
        config=config,
        devices=mesh.size,
        chip=chip,
        needs=needs,
        kernel_flops=mixing / mesh.size if kernels else 0.0,
        model_flops=model_flops / mesh.size,
        **parts,
    )


def _half(chip: Chip, devices: int) -> Chip:
    """One of the devices that a chip is to the compiler."""
    names = ("flops", "memory", "bandwidth", "ici", "dcn")
    rates = {name: getattr(chip, name) for name in names}
    return dataclasses.replace(chip, **{n: rate and rate / devices for n, rate in rates.items()})


def bytes_on_device(tree) -> int:
    """Of the part of every abstract array that one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _train(config: Config, mesh):
    training = Training(config, mesh)
    state = training.abstract
    parts = {
        "parameters": bytes_on_device((state.trainable, state.frozen)),
        "optimizer": bytes_on_device(state.optimizer),
        "cache": 0,
    }
    return training.lower(), parts


def _decode(config: ModelConfig, mesh, decode: Decode):
    """`engine_steps.generate` of one token, with the weights as training holds them, in float32."""
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    graph, weights = nnx.split(model)
    rules.check_divisible("rows", (decode.rows,), ("batch",), mesh)
    rules.check_divisible("model.streams", (config.streams,), ("streams",), mesh)
    params = abstract_weights(weights, mesh)
    seen = -(-decode.length // SLOTS)
    parts = math.prod(mesh.shape[axis] for axis in rules.RULES["blocks"])
    blocks = parts + decode.rows * config.streams * seen
    of_blocks = ("blocks", "kv_heads", None, None)
    of_rows = {WindowCache: ("batch", "streams", None, "kv_heads", None)}

    def place(node):
        axes = of_blocks if isinstance(node, BlockPool) else of_rows.get(type(node))

        def on_mesh(leaf):
            names = axes or ("batch", "streams", *(None,) * (leaf.ndim - 3))
            return _abstract(leaf, mesh, *(None,) * (leaf.ndim - len(names)), *names)

        return jax.tree.map(on_mesh, node)

    def caches(params):
        model = nnx.merge(graph, params)
        return model.init_blocks(blocks, SLOTS), model.init_states(decode.rows)

    is_node = lambda node: isinstance(node, BlockPool | WindowCache)
    cache = jax.tree.map(place, jax.eval_shape(caches, params), is_leaf=is_node)

    def integers(*shape, dtype=jnp.int32):
        axes = ("batch", "streams", None)[: len(shape)]
        return _abstract(jax.ShapeDtypeStruct((decode.rows, *shape[1:]), dtype), mesh, *axes)

    row = integers(0)
    floats = integers(0, dtype=jnp.float32)
    seeds = _abstract(jax.ShapeDtypeStruct((decode.rows, 3), jnp.uint32), mesh, "batch", None)
    until = _abstract(jax.ShapeDtypeStruct((decode.rows, 0), jnp.int32), mesh, "batch", None)
    counts = _abstract(jax.ShapeDtypeStruct((decode.rows, seen), jnp.int32), mesh, "batch", None)
    rows = Rows(row, row, None, None, row, row, integers(0, config.streams), row, until)
    views = Seen(integers(0, config.streams, seen), counts)
    choice = Choice(floats, row, floats, seeds)
    with jax.set_mesh(mesh):
        lowered = engine_steps.generate.lower(
            graph, params, *cache, rows, views, choice, steps=1, method="greedy"
        )
    return lowered, {
        "parameters": bytes_on_device(params),
        "optimizer": 0,
        "cache": bytes_on_device(cache),
    }


def _abstract(leaf, mesh, *axes):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rules.named_sharding(mesh, *axes))


def visible_pairs(config: ModelConfig, mixer: str, length: int) -> int:
    """Pairs of a query and a key that it sees in a row of one document, prefix included."""
    with_slots = config.streams > 1 and config.transform == "prefix"
    reach = min(length, config.window) if mixer == "window" else length
    pairs = reach * (reach + 1) // 2 + (length - reach) * reach
    return pairs + length * (config.transform_size if with_slots else 0)


def _train_flops(config: Config) -> tuple[float, float]:
    """Of the kernels, and of the model, in a step of all devices."""
    model, (rows, length) = config.model, (config.data.batch, config.data.length)
    slots = model.transform_size if model.streams > 1 and model.transform == "prefix" else 0
    layers = model.layers // len(model.mixers) * model.streams * rows
    forwards = 1 if model.remat == "none" else 2
    kernels, masked = 0.0, 0.0
    for mixer in model.mixers:
        if mixer in ATTENTION:
            pairs = visible_pairs(model, mixer, length)
            keys = min(length, model.window) if mixer == "window" else length
            kernels += layers * 4 * model.width * pairs * (forwards + BACKWARD_PRODUCTS)
            masked += layers * 4 * model.width * (length * (keys + slots) - pairs)
        else:
            macs = length * flops.recurrence_macs(model, mixer)
            kernels += layers * 2 * macs * (forwards + 2)
    return kernels, flops.train_flops(model, length, rows) - 3 * masked


def _decode_flops(config: ModelConfig, decode: Decode) -> float:
    """Of the model, for one more token of every row with a full cache."""
    total = flops.forward_flops(config, 1)
    for mixer in config.mixers:
        if mixer in ATTENTION:
            slots = min(decode.length, config.window) if mixer == "window" else decode.length
            layers = config.layers // len(config.mixers) * config.streams
            total += layers * 4 * config.width * (slots - 1)
    return decode.rows * total
