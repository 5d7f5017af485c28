"""What `experiments.bench` times of this project, and of jax itself, on the CPU.

Every function here builds the runs of one workload as `experiments.timing.Worker` expects them.
The PyTorch side is `experiments.peers`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from models.config import ModelConfig
from parscale.config import Config, DataConfig, TrainConfig
from sharding.settings import InputError, check_at_least, option

Runs = dict[str, Callable[[], None]]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The work: a model, the rows of a training step, and what is decoded."""

    width: int = option(256, "width of the model [D]")
    layers: int = option(6, "layers [L]")
    heads: int = option(8, "query heads [H]")
    kv_heads: int = option(2, "key/value heads [K]")
    mlp_width: int = option(704, "hidden width of the MLP [F]")
    vocab_size: int = option(256, "vocabulary [V]")
    streams: int = option(4, "streams of ours [P]")
    rows: int = option(32, "rows in a step's layers: batch times streams")
    length: int = option(256, "tokens in a row [T]")
    decode_rows: tuple[int, ...] = option((1, 4, 16), "numbers of prompts decoded at once")
    prompt: int = option(32, "tokens of a prompt")
    tokens: int = option(128, "new tokens of each prompt")
    mask_length: int = option(8192, "queries and keys of the comparison of masks")

    def __post_init__(self):
        names = (field.name for field in dataclasses.fields(self))
        check_at_least(self, 1, *(name for name in names if name != "decode_rows"))
        if not self.decode_rows or min(self.decode_rows) < 1:
            raise InputError(f"decode_rows={self.decode_rows}: expected numbers of at least 1")

    def model(self, streams: int) -> ModelConfig:
        """Our model of this shape.

        Raises:
          InputError: the sizes do not fit each other.
        """
        return ModelConfig(
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            mlp_width=self.mlp_width,
            vocab_size=self.vocab_size,
            streams=streams,
            max_length=max(self.length, self.prompt + self.tokens),
        )

    def config(self, streams: int) -> Config:
        """Our run of this shape, whose batch is `rows` over `streams`.

        Raises:
          InputError: the sizes do not fit each other.
        """
        if self.rows % streams:
            raise InputError(
                f"rows={self.rows} does not divide by streams={streams}: no whole batch"
            )
        return Config(
            model=self.model(streams),
            data=DataConfig(batch=self.rows // streams, length=self.length),
            train=TrainConfig(warmup_steps=0),
        )

    def ids(self, *shape: int) -> np.ndarray:
        """Random token ids, the same at every call."""
        return np.random.default_rng(0).integers(0, self.vocab_size, shape)


def train(shape: dict, streams: int) -> Runs:
    """One training step, of rows that are each one document."""
    step, _ = _training(Shape(**shape), streams)
    return {"step": step}


def _training(shape: Shape, streams: int):
    """A run that does one step, and what it works on: the training, its state, its batch."""
    import jax

    from parscale.training import Training
    from sharding.mesh import make_mesh

    config = shape.config(streams)
    training = Training(config, make_mesh(config.mesh, jax.devices()[:1]))
    held = {"state": training.init()}
    size = (config.data.batch, shape.length)
    ids = shape.ids(size[0], size[1] + 1).astype(np.int32)
    batch = {
        "ids": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment_ids": np.ones(size, np.int32),
        "positions": np.tile(np.arange(size[1], dtype=np.int32), (size[0], 1)),
        "mask": np.ones(size, np.float32),
    }

    def step():
        held["state"], _ = jax.block_until_ready(training.step(held["state"], batch))

    return step, (training, held, batch)


def decode(shape: dict, streams: int, rows: int) -> Runs:
    """Greedy decoding of `rows` prompts, prefill included, by the generation engine."""
    from flax import nnx

    from models.transformer import LanguageModel
    from parscale.generate import engine_for, submit_all

    shape = Shape(**shape)
    model = LanguageModel(shape.model(streams), rngs=nnx.Rngs(0))
    prompts = shape.ids(rows, shape.prompt).tolist()
    engine = engine_for(model, prompts, shape.tokens)

    def generate():
        numbers = submit_all(engine, prompts, shape.tokens)
        results = engine.run()
        if any(len(results[number].tokens) != shape.tokens for number in numbers):
            raise RuntimeError("a row has too few tokens")

    return {"generate": generate}


def attention(shape: dict) -> Runs:
    """`pallas_kernels.attention`, causal, of `rows` rows."""
    from pallas_kernels import attention, masks

    return _attention_runs(Shape(**shape), lambda q, k, v: attention(q, k, v, masks.causal()))


def jax_attention(shape: dict) -> Runs:
    """`jax.nn.dot_product_attention` of the same arrays."""
    import jax

    def op(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    return _attention_runs(Shape(**shape), op)


def _attention_runs(shape: Shape, op) -> Runs:
    import jax.numpy as jnp

    return op_runs(op, [jnp.asarray(array) for array in qkv(shape)])


def masked_attention(shape: dict, kinds: Sequence[str]) -> Runs:
    """`pallas_kernels.attention` of a long row under several masks, forward and backward."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import attention
    from pallas_kernels.masks.examples import example

    shape = dataclasses.replace(Shape(**shape), rows=1)
    shape = dataclasses.replace(shape, length=shape.mask_length)
    arrays = [jnp.asarray(array) for array in qkv(shape)]

    @jax.jit
    def both(mask, *arrays):
        y, back = jax.vjp(lambda q, k, v: attention(q, k, v, mask), *arrays)
        return y, back(jnp.ones_like(y))

    def run(mask):
        return lambda: jax.block_until_ready(both(mask, *arrays))

    return {kind: run(example(kind, 1, shape.length)) for kind in kinds}


def qkv(shape: Shape) -> list[np.ndarray]:
    """Float32 q `[B, T, H, h]`, k and v `[B, T, K, h]`, standard normal."""
    rng = np.random.default_rng(0)
    head_dim = shape.model(1).head_dim
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    return [rng.standard_normal((shape.rows, shape.length, n, head_dim), np.float32) for n in heads]


def op_runs(op, arrays) -> Runs:
    """Forward, and forward with backward to every argument."""
    import jax
    import jax.numpy as jnp

    forward = jax.jit(op)

    @jax.jit
    def both(*arrays):
        y, back = jax.vjp(op, *arrays)
        return y, back(jax.tree.map(jnp.ones_like, y))

    return {
        "forward": lambda: jax.block_until_ready(forward(*arrays)),
        "forward and backward": lambda: jax.block_until_ready(both(*arrays)),
    }


def parts(shape: dict, streams: int) -> Runs:
    """A training step and its parts, each compiled on its own.

    Returns:
      `step`; `evaluate` (the forward pass and the loss); `optimizer`; `head and loss`; and of one
      layer `attention` and `dense`, the last three with their backward passes.
    """
    import jax
    import jax.numpy as jnp

    from pallas_kernels import attention, masks
    from parscale.loss import token_losses

    shape = Shape(**shape)
    step, (training, held, batch) = _training(shape, streams)
    config = training.config
    rows, length = config.data.batch, shape.length
    head_dim = config.model.head_dim

    def normal(*size):
        return jax.random.normal(jax.random.key(0), size)

    prefix = None
    if streams > 1:
        slots = (streams, shape.kv_heads, config.model.transform_size, head_dim)
        prefix = (normal(*slots), normal(*slots))
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    arrays = [normal(rows, streams, length, n, head_dim) for n in heads]
    segment_ids = jnp.asarray(batch["segment_ids"])

    def attend(prefix, q, k, v):
        return attention(q, k, v, masks.packed(segment_ids), prefix=prefix)

    def dense(weights, inputs):
        return [x @ w for x, w in zip(inputs, weights, strict=True)]

    qkv_width = (shape.heads + 2 * shape.kv_heads) * head_dim
    sizes = [
        (shape.width, qkv_width),
        (shape.width, shape.width),
        (shape.width, 2 * shape.mlp_width),
        (shape.mlp_width, shape.width),
    ]
    weights = [normal(*size) for size in sizes]
    inputs = [normal(rows * streams * length, size[0]) for size in sizes]

    def loss(x, head):
        return token_losses(x, head, jnp.asarray(batch["targets"]), config.train.loss_chunk)

    head_arrays = [normal(rows, length, shape.width), normal(shape.width, shape.vocab_size)]

    @jax.jit
    def update(state):
        return training.optimizer.update(state.trainable, state.optimizer, state.trainable)

    both = "forward and backward"
    return {
        "step": step,
        "evaluate": lambda: jax.block_until_ready(training.evaluate(held["state"], batch)),
        "attention": op_runs(attend, [prefix, *arrays])[both],
        "dense": op_runs(dense, [weights, inputs])[both],
        "head and loss": op_runs(loss, head_arrays)[both],
        "optimizer": lambda: jax.block_until_ready(update(held["state"])),
    }


def versions() -> dict[str, str]:
    """Of the packages that are timed; those not installed are left out."""
    import importlib.metadata

    found = {}
    for name in ("jax", "jaxlib", "flax", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
