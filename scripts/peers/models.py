#!/usr/bin/env python3
"""Writes models with random weights, the same values for us (safetensors) and for llama.cpp (GGUF).

usage: .peers/venv/bin/python scripts/peers/models.py FOLDER [NAME...]

Every tensor's values come from numpy's generator with the seed 0 and the tensor's name, so they do
not depend on the order or on the format. Norms are near 1; a matrix is normal with the deviation at
which its products are as large as its inputs, so that every layer has a say in the tokens. A GGUF
file has no vocabulary beyond its size: both sides get ids.
"""
import json, os, sys, zlib
import gguf
import numpy as np

TYPES = gguf.GGMLQuantizationType
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5,
         "rope_theta": 10000.0, "max_position_embeddings": 4096}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "rms_norm_eps": 1e-6,
         "rope_theta": 1000000.0, "max_position_embeddings": 40960}


def shape(family, hidden, inner, layers, heads, kv_heads, head_dim, vocab, tied):
    return {**family, "hidden_size": hidden, "intermediate_size": inner,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
            "vocab_size": vocab, "tie_word_embeddings": tied, "hidden_act": "silu",
            "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
            "bos_token_id": 0, "eos_token_id": 1}


SHAPES = {
    "qwen3-0.6b": (shape(QWEN3, 1024, 3072, 28, 16, 8, 128, 151936, True), ["bf16", "f16"],
                   ["bf16", "f16", "q8_0", "q4_0"]),
    "llama-256": (shape(LLAMA, 256, 704, 4, 4, 4, 64, 512, False), ["bf16"], ["bf16"]),
    "llama-64": (shape(LLAMA, 64, 176, 4, 2, 2, 32, 256, False), ["f32"], ["f32"]),
}
LAYER = "model.layers.{}."


def tensors(config):
    """(our name, GGUF's name, shape) of every tensor."""
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    yield "model.embed_tokens.weight", "token_embd.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = LAYER.format(layer), f"blk.{layer}."
        yield ours + "input_layernorm.weight", theirs + "attn_norm.weight", (hidden,)
        yield ours + "self_attn.q_proj.weight", theirs + "attn_q.weight", (query, hidden)
        yield ours + "self_attn.k_proj.weight", theirs + "attn_k.weight", (kv, hidden)
        yield ours + "self_attn.v_proj.weight", theirs + "attn_v.weight", (kv, hidden)
        yield ours + "self_attn.o_proj.weight", theirs + "attn_output.weight", (hidden, query)
        if config["model_type"] == "qwen3":
            yield ours + "self_attn.q_norm.weight", theirs + "attn_q_norm.weight", (dim,)
            yield ours + "self_attn.k_norm.weight", theirs + "attn_k_norm.weight", (dim,)
        yield ours + "post_attention_layernorm.weight", theirs + "ffn_norm.weight", (hidden,)
        yield ours + "mlp.gate_proj.weight", theirs + "ffn_gate.weight", (inner, hidden)
        yield ours + "mlp.up_proj.weight", theirs + "ffn_up.weight", (inner, hidden)
        yield ours + "mlp.down_proj.weight", theirs + "ffn_down.weight", (hidden, inner)
    yield "model.norm.weight", "output_norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", "output.weight", (config["vocab_size"], hidden)


def values(name, shape):
    random = np.random.default_rng([0, zlib.crc32(name.encode())])
    normal = random.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return 1 + normal * np.float32(0.05)
    return normal / np.sqrt(np.float32(shape[1]))


def to_bf16(x):
    """The upper halves, rounded to the nearest, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def stored(x, form):
    """The bytes of our file."""
    return to_bf16(x) if form == "bf16" else x.astype({"f32": np.float32, "f16": np.float16}[form])


def write_ours(folder, config, form):
    os.makedirs(folder, exist_ok=True)
    header, offset = {}, 0
    size = {"f32": 4}.get(form, 2)
    for name, _, dims in tensors(config):
        end = offset + int(np.prod(dims)) * size
        header[name] = {"dtype": form.upper(), "shape": list(dims), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    # Tensors begin at multiples of 64 bytes, so that they can be used in place.
    text += b" " * (-(len(text) + 8) % 64)
    with open(f"{folder}/model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, _, dims in tensors(config):
            file.write(stored(values(name, dims), form).tobytes())
    with open(f"{folder}/config.json", "w") as file:
        json.dump({**config, "torch_dtype": {"f32": "float32", "f16": "float16",
                                             "bf16": "bfloat16"}[form]}, file, indent=1)


def pairs_together(x, heads):
    """Rows of llama's queries and keys as GGUF has them: both values of a rotated pair together."""
    dim = x.shape[0] // heads
    return x.reshape(heads, 2, dim // 2, -1).swapaxes(1, 2).reshape(x.shape)


def write_gguf(path, config, form):
    arch = config["model_type"]
    writer = gguf.GGUFWriter(path + ".part", arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    kind = TYPES[form.upper()]
    for ours, theirs, dims in tensors(config):
        x = values(ours, dims)
        if arch == "llama" and ".q_proj." in ours:
            x = pairs_together(x, config["num_attention_heads"])
        if arch == "llama" and ".k_proj." in ours:
            x = pairs_together(x, config["num_key_value_heads"])
        if len(dims) == 1:
            # Our file's norms are rounded to its format.
            if form == "bf16":
                x = (to_bf16(x).astype(np.uint32) << 16).view(np.float32)
            elif form == "f16":
                x = x.astype(np.float16).astype(np.float32)
            writer.add_tensor(theirs, x, raw_dtype=TYPES.F32)
        else:
            writer.add_tensor(theirs, gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(path + ".part", path)


def main():
    folder, names = sys.argv[1], sys.argv[2:] or list(SHAPES)
    os.makedirs(folder, exist_ok=True)
    for name in names:
        config, our_forms, their_forms = SHAPES[name]
        for form in our_forms:
            path = f"{folder}/{name}-{form}"
            if not os.path.exists(f"{path}/config.json"):
                print("writing", path, file=sys.stderr)
                write_ours(path, config, form)
        for form in their_forms:
            path = f"{folder}/{name}-{form}.gguf"
            if not os.path.exists(path):
                print("writing", path, file=sys.stderr)
                write_gguf(path, config, form)


if __name__ == "__main__":
    main()
