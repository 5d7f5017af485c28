"""The PyTorch side of `experiments.bench`: the same work by torch and transformers, on the CPU.

Runs are built as `experiments.timing.Worker` expects them. Both packages come with the `[peers]`
extra; nothing else of this project imports them.
"""

import torch
import torch.nn.functional
import transformers

from experiments.workloads import Runs, Shape, qkv


def _model(shape: Shape) -> transformers.Qwen2ForCausalLM:
    """`Qwen2ForCausalLM` of this shape with random weights and torch's fused attention."""
    config = transformers.Qwen2Config(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.mlp_width,
        vocab_size=shape.vocab_size,
        max_position_embeddings=max(shape.length, shape.prompt + shape.tokens),
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.Qwen2ForCausalLM(config)


def train(shape: dict) -> Runs:
    """One training step of the plain model: cross-entropy, clipping, AdamW, as ours does."""
    shape = Shape(**shape)
    model = _model(shape).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    ids = torch.from_numpy(shape.ids(shape.rows, shape.length + 1))

    def step():
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return {"step": step}


def decode(shape: dict, rows: int) -> Runs:
    """Greedy decoding of `rows` prompts by `generate`, with its key/value cache."""
    shape = Shape(**shape)
    model = _model(shape).eval()
    ids = torch.from_numpy(shape.ids(rows, shape.prompt))

    def generate():
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=shape.tokens,
                max_new_tokens=shape.tokens,
            )
        if out.shape[1] != shape.prompt + shape.tokens:
            raise RuntimeError(f"generate gave {out.shape[1]} tokens a row")

    return {"generate": generate}


def attention(shape: dict) -> Runs:
    """`scaled_dot_product_attention`, causal, of the same arrays in torch's layout."""
    q, k, v = (
        torch.from_numpy(array).transpose(1, 2).contiguous().requires_grad_()
        for array in qkv(Shape(**shape))
    )
    weight = torch.ones_like(q)

    def op():
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )

    def forward():
        with torch.inference_mode():
            op()

    return {
        "forward": forward,
        "forward and backward": lambda: torch.autograd.grad(op(), (q, k, v), weight),
    }
