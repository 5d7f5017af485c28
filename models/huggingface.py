"""Hugging Face directories of the Qwen2 family, in and out, tensor by tensor.

`Qwen2ForCausalLM` is the plain model (P = 1), `Qwen2ParScaleForCausalLM` the authors' layout for
P > 1 (arXiv 2505.10475). Only safetensors are read, never pickles, and no code of the directory is
run.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.config import ModelConfig
from models.huggingface_tensors import Tensor, tensor_table
from models.transformer import LanguageModel
from sharding.settings import InputError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PLAIN = "Qwen2ForCausalLM"
PARSCALE = "Qwen2ParScaleForCausalLM"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
    "merges.txt", "generation_config.json",
)  # fmt: skip
SHARD_BYTES = 4 << 30
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "parscale_n", "parscale_n_tokens",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")


def load(directory: str | Path) -> LanguageModel:
    """The model in a Hugging Face directory, with float32 weights.

    Args:
      directory: holds `config.json` and `model.safetensors`, or its shards and their index.

    Raises:
      InputError: not such a directory, a model of another family or with settings that we do not
        have, or missing, extra or wrongly shaped tensors.
    """
    config = read_config(directory)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, to_device(load_params(directory, config, abstract)))


def read_config(directory: str | Path) -> ModelConfig:
    """The configuration of the model in a Hugging Face directory. Raises InputError as `load`."""
    theirs = read_json(directory)
    where = f"{directory}/{CONFIG}"
    names = theirs.get("architectures") or [
        {"qwen2": PLAIN, "qwen2_parscale": PARSCALE}.get(theirs.get("model_type"), "none")
    ]
    if names[0] not in (PLAIN, PARSCALE):
        raise InputError(f"{where}: architecture {names[0]}: expected {PLAIN} or {PARSCALE}")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    refused = {
        "hidden_act": theirs.get("hidden_act", "silu") != "silu",
        "use_sliding_window": bool(theirs.get("use_sliding_window")),
        "rope_scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
        "quantization_config": bool(theirs.get("quantization_config")),
    }
    for name in (name for name, is_refused in refused.items() if is_refused):
        value = rope if name == "rope_scaling" else theirs[name]
        raise InputError(f"{where}: {name}={value!r} is not supported")
    for name in SIZES:
        if not isinstance(theirs.get(name, 1), int):
            raise InputError(f"{where}: {name}={theirs[name]!r}: expected a whole number")
    try:
        streams = theirs.get("parscale_n", 1) if names[0] == PARSCALE else 1
        config = ModelConfig(
            vocab_size=theirs["vocab_size"],
            width=theirs["hidden_size"],
            layers=theirs["num_hidden_layers"],
            heads=theirs["num_attention_heads"],
            kv_heads=theirs["num_key_value_heads"],
            mlp_width=theirs["intermediate_size"],
            tied_embeddings=theirs.get("tie_word_embeddings", False),
            rope_theta=float(rope.get("rope_theta", theirs.get("rope_theta", 10000.0))),
            norm_eps=theirs.get("rms_norm_eps", 1e-6),
            init_std=theirs.get("initializer_range", 0.02),
            max_length=theirs.get("max_position_embeddings", 2048),
            streams=streams,
            transform_size=theirs.get("parscale_n_tokens", 48),
            smoothing=theirs.get("parscale_attn_smooth", 0.01) if streams > 1 else 0.1,
        )
    except KeyError as error:
        raise InputError(f"{where}: {error.args[0]} is missing") from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if theirs.get("head_dim", config.head_dim) != config.head_dim:
        raise InputError(
            f"{where}: head_dim={theirs['head_dim']}: only hidden_size / num_attention_heads "
            f"= {config.head_dim} is supported"
        )
    return config


def read_json(directory: str | Path) -> dict[str, Any]:
    """The `config.json` of a Hugging Face directory. Raises InputError if there is none."""
    path = Path(directory) / CONFIG
    try:
        theirs = json.loads(path.read_text())
    except OSError:
        raise InputError(
            f"{directory} is not a Hugging Face directory: it has no {CONFIG}"
        ) from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(theirs, dict):
        raise InputError(f"{path} is not a JSON object")
    return theirs


def load_params(
    directory: str | Path, config: ModelConfig, abstract: nnx.State | None = None
) -> dict[str, Any]:
    """The weights of a Hugging Face directory as a nested dict of float32 NumPy arrays.

    One tensor at a time is in memory beside the result.

    Raises:
      InputError: missing, extra or wrongly shaped tensors, all of them named.
    """
    if abstract is None:
        abstract = nnx.state(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    tensors = tensor_table(config)
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path in weight_files(directory):
        with open_file(path) as file:
            for name in list(file.keys()):
                found[name] = (path, tuple(file.get_slice(name).get_shape()))
    if config.tied_embeddings:
        drop_tied_head(found)
    complain_of_tensors(directory, found, tensors)
    params = nnx.to_pure_dict(nnx.map(lambda _, leaf: np.empty(leaf.shape, np.float32), abstract))
    for path in sorted({path for path, _ in found.values()}):
        with open_file(path) as file:
            for name in (name for name, (where, _) in found.items() if where == path):
                tensor = tensors[name]
                array = tensor.read(file.get_tensor(name)).astype(np.float32)
                target = params
                for part in tensor.path[:-1]:
                    target = target[part]
                if tensor.layer is None:
                    target[tensor.path[-1]][...] = array
                else:
                    target[tensor.path[-1]][tensor.layer] = array
    return params


def save(model: LanguageModel, directory: str | Path, *, like: str | Path | None = None) -> None:
    """Writes a model as a Hugging Face directory.

    Args:
      model: to be written.
      directory: made if it is not there.
      like: a Hugging Face directory whose type of weights, tokenizer files and other settings the
        new one keeps; without it the weights are float32.

    Raises:
      InputError: the layout cannot hold the model (another mixer than attention, another transform
        than prefixes, another aggregation than the dynamic one, no biases on q, k and v).
    """
    weights = nnx.to_pure_dict(nnx.state(model))
    if isinstance(model.layers, nnx.List):
        layers = [weights["layers"][layer] for layer in range(model.config.layers)]
        weights["layers"] = jax.tree.map(lambda *arrays: np.stack(arrays), *layers)
    save_params(weights, model.config, directory, like=like)


def save_params(
    params: dict[str, Any],
    config: ModelConfig,
    directory: str | Path,
    *,
    like: str | Path | None = None,
) -> None:
    """`save` for a nested dict of arrays."""
    check_exportable(config)
    theirs = (read_json(like) if like else {}) | config_json(config)
    dtype = theirs["torch_dtype"] = theirs.get("torch_dtype") or theirs.get("dtype") or "float32"
    if dtype not in DTYPES:
        raise InputError(
            f"{like}/{CONFIG}: torch_dtype={dtype!r}: expected one of {', '.join(DTYPES)}"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files, index = write_shards(params, config, directory, jnp.dtype(dtype))
    # Of an older model in this directory, nothing may be left that a reader would prefer.
    if files > 1:
        (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        (directory / WEIGHTS).unlink(missing_ok=True)
    else:
        (directory / INDEX).unlink(missing_ok=True)
    (directory / CONFIG).write_text(json.dumps(theirs, indent=1) + "\n")
    for name in TOKENIZER_FILES if like else ():
        if (Path(like) / name).exists():
            shutil.copy(Path(like) / name, directory / name)


def check_exportable(config: ModelConfig) -> None:
    """Raises InputError if Hugging Face's layout cannot hold a model of this configuration."""
    if config.mixers != ("attention",):
        raise InputError(
            f"export: {PLAIN} and {PARSCALE} hold layers of attention alone; this model has "
            f"mixers={','.join(config.mixers)}"
        )
    if not config.qkv_bias:
        raise InputError("export: Qwen2 has biases on q, k and v, this model has qkv_bias=False")
    if config.streams > 1 and (config.transform, config.aggregation) != ("prefix", "dynamic"):
        raise InputError(
            f"export: {PARSCALE} holds transform=prefix with aggregation=dynamic; this model has "
            f"transform={config.transform} with aggregation={config.aggregation}"
        )


def config_json(config: ModelConfig) -> dict[str, Any]:
    """What `config.json` says of a model."""
    parscale = config.streams > 1
    theirs = {
        "architectures": [PARSCALE if parscale else PLAIN],
        "model_type": "qwen2_parscale" if parscale else "qwen2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
        "use_sliding_window": False,
    }
    if parscale:
        theirs |= {
            "parscale_n": config.streams,
            "parscale_n_tokens": config.transform_size,
            "parscale_attn_smooth": config.smoothing,
        }
    return theirs


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files of a directory. Raises InputError if one is not there."""
    directory = Path(directory)
    if (directory / WEIGHTS).exists():
        return [directory / WEIGHTS]
    if not (directory / INDEX).exists():
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        hint = f" ({pickles[0]} is a pickle, which is never read)" if pickles else ""
        raise InputError(f"{directory}: no {WEIGHTS} and no {INDEX}{hint}")
    try:
        names = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{directory / INDEX} is not an index of safetensors files") from None
    for name in names:
        if Path(str(name)).name != name or not (directory / name).exists():
            raise InputError(f"{directory / INDEX} names {name}, which is not in the directory")
    return [directory / name for name in names]


def open_file(path: Path) -> Any:
    """An open safetensors file. Raises InputError if it is not one."""
    try:
        return safe_open(path, "np")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}") from None


def drop_tied_head(found: dict[str, tuple[Path, tuple[int, ...]]]) -> None:
    """Forgets a stored LM head that equals the embedding it is tied to; refuses another."""
    if "lm_head.weight" not in found or "model.embed_tokens.weight" not in found:
        return
    arrays = []
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        with open_file(found[name][0]) as file:
            arrays.append(file.get_tensor(name))
    if not np.array_equal(*arrays):
        raise InputError(
            f"{found['lm_head.weight'][0]}: lm_head.weight differs from the embedding, although "
            f"{CONFIG} says tie_word_embeddings"
        )
    del found["lm_head.weight"]


def complain_of_tensors(directory, found, tensors: dict[str, Tensor]) -> None:
    """Raises InputError, naming them, if tensors are missing, extra or wrongly shaped."""
    problems = []
    if missing := sorted(tensors.keys() - found.keys()):
        problems.append(f"missing {listing(missing)}")
    if extra := sorted(found.keys() - tensors.keys()):
        problems.append(f"unknown {listing(extra)}")
    shapes = [
        f"{name} {list(found[name][1])} (expected {list(tensor.shape)})"
        for name, tensor in tensors.items()
        if name in found and found[name][1] != tensor.shape
    ]
    if shapes:
        problems.append(f"wrongly shaped {listing(shapes)}")
    if problems:
        raise InputError(f"{directory}: tensors do not fit {CONFIG}: {'; '.join(problems)}")


def listing(names: list[str], most: int = 8) -> str:
    """The names, or the first of them and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def export_tensors(
    params: dict[str, Any], config: ModelConfig, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the Hugging Face layout by name, one at a time."""
    for name, tensor in tensor_table(config).items():
        array = params
        for part in tensor.path:
            array = array[part]
        if tensor.layer is not None:
            array = array[tensor.layer]
        yield name, np.ascontiguousarray(tensor.write(np.asarray(array)).astype(dtype))


def write_shards(
    params: dict[str, Any], config: ModelConfig, directory: Path, dtype: np.dtype
) -> tuple[int, dict[str, Any]]:
    """Writes the weights, at most `SHARD_BYTES` a file; returns the number of files, the index."""
    sizes = {
        name: int(np.prod(tensor.shape)) * dtype.itemsize
        for name, tensor in tensor_table(config).items()
    }
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled + size > SHARD_BYTES and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [
        f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
    ]  # fmt: skip
    tensors = export_tensors(params, config, dtype)
    weight_map = {}
    for file, members in zip(names, shards, strict=True):
        content = dict(next(tensors) for _ in members)
        save_file(content, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(content, file)
    return count, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}


def to_device(params: dict[str, Any]) -> dict[str, Any]:
    """The same tree with jax arrays."""
    return {
        name: to_device(value) if isinstance(value, dict) else jnp.asarray(value)
        for name, value in params.items()
    }
