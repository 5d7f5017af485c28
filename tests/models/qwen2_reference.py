"""An independent Qwen2 and ParScale decoder in NumPy float64, on tensors in Hugging Face names."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
PARSCALE = CONFIG | {
    "architectures": ["Qwen2ParScaleForCausalLM"],
    "model_type": "qwen2_parscale",
    "parscale_n": 3,
    "parscale_n_tokens": 5,
    "parscale_attn_smooth": 0.2,
}


def random_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 tensors of the size of trained ones, biases and norm scales included."""
    rng = np.random.default_rng(seed)
    width, hidden, vocab = (
        config[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    head = width // config["num_attention_heads"]
    kv = config["num_key_value_heads"]
    streams = config.get("parscale_n", 1)
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    if streams > 1:
        shapes["model.aggregate_layer.0.weight"] = (width, width * streams)
        shapes["model.aggregate_layer.0.bias"] = (width,)
        shapes["model.aggregate_layer.2.weight"] = (streams, width)
        shapes["model.aggregate_layer.2.bias"] = (streams,)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        for letter, size in (("q", width), ("k", kv * head), ("v", kv * head)):
            shapes[f"{name}self_attn.{letter}_proj.weight"] = (size, width)
            shapes[f"{name}self_attn.{letter}_proj.bias"] = (size,)
        shapes[f"{name}self_attn.o_proj.weight"] = (width, width)
        shapes[f"{name}mlp.gate_proj.weight"] = (hidden, width)
        shapes[f"{name}mlp.up_proj.weight"] = (hidden, width)
        shapes[f"{name}mlp.down_proj.weight"] = (width, hidden)
        shapes[f"{name}input_layernorm.weight"] = (width,)
        shapes[f"{name}post_attention_layernorm.weight"] = (width,)
        if streams > 1:
            slots = config["parscale_n_tokens"]
            shapes[f"{name}self_attn.prefix_k"] = (streams, kv, slots, head)
            shapes[f"{name}self_attn.prefix_v"] = (streams, kv, slots, head)

    def draw(name, shape):
        values = rng.normal(size=shape)
        if "norm" in name:
            return 1 + 0.2 * values
        return values * (0.3 if len(shape) == 1 else 0.25)

    return {name: draw(name, shape).astype(np.float32) for name, shape in shapes.items()}


def write_directory(directory: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    """A Hugging Face directory with one safetensors file."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def logits(config: dict, tensors: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Logits `[B, T, V]`, float64, row by row, stream by stream, head by head."""
    tensors = {name: value.astype(np.float64) for name, value in tensors.items()}
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    streams = config.get("parscale_n", 1)
    rows = []
    for row in ids:
        outputs = [hidden_states(config, tensors, row, p) for p in range(streams)]
        rows.append((aggregate(config, tensors, outputs) if streams > 1 else outputs[0]) @ head.T)
    return np.stack(rows)


def hidden_states(config: dict, tensors: dict, row: np.ndarray, stream: int) -> np.ndarray:
    """One stream's output `[T, D]` after the final norm."""
    eps = config["rms_norm_eps"]
    x = tensors["model.embed_tokens.weight"][row]
    for layer in range(config["num_hidden_layers"]):
        part = f"model.layers.{layer}."
        own = {name[len(part) :]: t for name, t in tensors.items() if name.startswith(part)}
        y = rms_norm(x, own["input_layernorm.weight"], eps)
        x = x + self_attention(config, own, y, stream)
        y = rms_norm(x, own["post_attention_layernorm.weight"], eps)
        gate = y @ own["mlp.gate_proj.weight"].T
        up = y @ own["mlp.up_proj.weight"].T
        x = x + (silu(gate) * up) @ own["mlp.down_proj.weight"].T
    return rms_norm(x, tensors["model.norm.weight"], eps)


def self_attention(config: dict, own: dict, y: np.ndarray, stream: int) -> np.ndarray:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    length, width = y.shape
    size = width // heads

    def project(letter, count):
        flat = y @ own[f"self_attn.{letter}_proj.weight"].T + own[f"self_attn.{letter}_proj.bias"]
        return flat.reshape(length, count, size).swapaxes(0, 1)

    theta = config["rope_theta"]
    q = rotate(project("q", heads), theta)
    k = rotate(project("k", kv_heads), theta)
    v = project("v", kv_heads)
    outputs = []
    for h in range(heads):
        group = h // (heads // kv_heads)
        keys, values = k[group], v[group]
        slots = 0
        if "self_attn.prefix_k" in own:
            slots = config["parscale_n_tokens"]
            keys = np.concatenate([own["self_attn.prefix_k"][stream, group], keys])
            values = np.concatenate([own["self_attn.prefix_v"][stream, group], values])
        scores = q[h] @ keys.T / np.sqrt(size)
        visible = np.tri(length, length + slots, slots, dtype=bool)
        outputs.append(softmax(np.where(visible, scores, -np.inf)) @ values)
    return np.concatenate(outputs, -1) @ own["self_attn.o_proj.weight"].T


def aggregate(config: dict, tensors: dict, outputs: list[np.ndarray]) -> np.ndarray:
    """The weighted sum of the streams; the first matrix reads d-major, p-minor."""
    name, streams = "model.aggregate_layer", len(outputs)
    features = np.stack(outputs, -1).reshape(len(outputs[0]), -1)
    hidden = silu(features @ tensors[f"{name}.0.weight"].T + tensors[f"{name}.0.bias"])
    weights = softmax(hidden @ tensors[f"{name}.2.weight"].T + tensors[f"{name}.2.bias"])
    eps = config["parscale_attn_smooth"]
    weights = weights * (1 - eps) + eps / streams
    return sum(weights[:, p : p + 1] * outputs[p] for p in range(streams))


def rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """Rotary embedding of `[n, T, h]`: the first half + i times the second half, turned."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], -1)


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * scale


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
