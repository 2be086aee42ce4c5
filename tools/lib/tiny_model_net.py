"""The network: a Llama-architecture decoder over bytes, in plain PyTorch functions over a dict of weights."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import tiny_model_ops as ops


@dataclass
class Shape:
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 768
    vocab: int = 256
    positions: int = 2048
    rope_theta: float = 10000.0
    eps: float = 1e-5


def init_weights(shape, seed):
    """fp32 weights by HF name (without `model.`); the embedding is also the output matrix."""
    gen = torch.Generator().manual_seed(seed)
    weights = {"embed_tokens": torch.randn(shape.vocab, shape.hidden, generator=gen) * 0.02}
    q_rows, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for n in range(shape.layers):
        for name, rows, columns, is_output in (
            ("self_attn.q_proj", q_rows, shape.hidden, False),
            ("self_attn.k_proj", kv_rows, shape.hidden, False),
            ("self_attn.v_proj", kv_rows, shape.hidden, False),
            ("self_attn.o_proj", shape.hidden, q_rows, True),
            ("mlp.gate_proj", shape.ffn, shape.hidden, False),
            ("mlp.up_proj", shape.ffn, shape.hidden, False),
            ("mlp.down_proj", shape.hidden, shape.ffn, True),
        ):
            std = (1 / math.sqrt(2 * shape.layers) if is_output else 1.0) / math.sqrt(columns)
            weights[f"layers.{n}.{name}"] = torch.randn(rows, columns, generator=gen) * std
        weights[f"layers.{n}.input_layernorm"] = torch.ones(shape.hidden)
        weights[f"layers.{n}.post_attention_layernorm"] = torch.ones(shape.hidden)
    weights["norm"] = torch.ones(shape.hidden)
    return weights


def rope_tables(shape, length):
    inverse = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * inverse
    return angles.cos().float(), angles.sin().float()


def attention_in(x, gain, w_qkv, cos, sin, shape):
    batch, length, _ = x.shape
    y = ops.RmsNorm.apply(x, gain, shape.eps, w_qkv.dtype)
    qkv = F.linear(y, w_qkv).view(batch, length, shape.heads + 2 * shape.kv_heads, shape.head_dim)
    rotated, v = qkv.split([shape.heads + shape.kv_heads, shape.kv_heads], 2)
    q, k = ops.Rope.apply(rotated, cos, sin).split([shape.heads, shape.kv_heads], 2)
    return q, k, v


def attention_out_and_mlp(x, mixed, gain, w_out, w_gate_up, w_down, shape):
    x = x + F.linear(mixed, w_out)
    y = ops.RmsNorm.apply(x, gain, shape.eps, w_out.dtype)
    return x + F.linear(ops.SwiGlu.apply(F.linear(y, w_gate_up)), w_down)


def token_losses(x, gain, embed, targets, eps):
    logits = F.linear(ops.RmsNorm.apply(x, gain, eps, embed.dtype), embed).float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets), logits.argmax(-1)


class Net:
    """Holds fp32 weights; the matrix products are computed in `dtype`, the residual stream and the norms in fp32."""

    def __init__(self, shape, weights, dtype=torch.bfloat16):
        self.shape, self.weights, self.dtype = shape, weights, dtype
        self.cos, self.sin = rope_tables(shape, shape.positions)

    def losses(self, tokens, targets):
        """Loss of each target in nats and the most likely byte at each place, both [B, S]."""
        w, shape = self.weights, self.shape
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        cast = lambda *names: torch.cat([w[name].to(self.dtype) for name in names])
        x = F.embedding(tokens, w["embed_tokens"])
        for n in range(shape.layers):
            p = f"layers.{n}."
            qkv = cast(p + "self_attn.q_proj", p + "self_attn.k_proj", p + "self_attn.v_proj")
            q, k, v = attention_in(x, w[p + "input_layernorm"], qkv, cos, sin, shape)
            mixed = ops.CausalAttention.apply(q, k, v)
            gate_up = cast(p + "mlp.gate_proj", p + "mlp.up_proj")
            x = attention_out_and_mlp(
                x, mixed, w[p + "post_attention_layernorm"], cast(p + "self_attn.o_proj"), gate_up, cast(p + "mlp.down_proj"), shape
            )
        return token_losses(x, w["norm"], cast("embed_tokens"), targets, shape.eps)


def parameters(weights):
    return sum(w.numel() for w in weights.values())


def export(weights, shape, out):
    """Writes model.safetensors (f16) and config.json with HF names."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    header, chunks, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name in sorted(weights):
        data = weights[name].detach().numpy().astype(np.float16)
        if not np.isfinite(data).all():
            raise ValueError(f"{name} does not fit f16")
        header[f"model.{name}.weight"] = {"dtype": "F16", "shape": list(data.shape), "data_offsets": [offset, offset + data.nbytes]}
        chunks.append(data.tobytes())
        offset += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(out / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + b"".join(chunks))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_theta,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.positions,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "rope_layout": "half_split",
        "tokenizer": "bytes",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_exported(directory):
    """(shape, fp32 weights) of a directory written by `export`."""
    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    shape = Shape(
        config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"],
        config["head_dim"], config["intermediate_size"], config["vocab_size"], config["max_position_embeddings"],
        config["rope_theta"], config["rms_norm_eps"],
    )
    raw = (directory / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    weights = {}
    for name, entry in json.loads(raw[8 : 8 + size]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            data = np.frombuffer(raw[8 + size + begin : 8 + size + end], np.float16).astype(np.float32)
            weights[name.removeprefix("model.").removesuffix(".weight")] = torch.from_numpy(data.reshape(entry["shape"]))
    return shape, weights
