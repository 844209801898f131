#!/usr/bin/env python3
"""Decoding by PyTorch with a CUDA graph: the time of a token, on random weights.

usage: torch_peer.py CONFIG.json [--prompt 64] [--tokens 200] [--context 1024] [--compile]

One sequence, bf16, a cache of fixed length, the whole token in one graph: embedding, layers, head and
the choice of the largest logit, whose token is the next one's input. Projections of queries, keys and
values are one product, those of gate and up another. With --compile, torch.compile makes its own
kernels of a layer and of what follows the layers; it needs a C compiler.
Prints one JSON object with microseconds. Positions before the timed ones are zeros in the cache,
which costs as much as a prompt of that length.
"""
import argparse, json

import torch
import torch.nn.functional as F

KV_HEADS = 8


def norm(x, weight, eps):
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def layer(x, w, cache, position, mask, cos, sin, heads, dim, eps, has_norms):
    qkv = F.linear(norm(x, w[0], eps), w[1])
    q, k, v = qkv.view(-1, dim).split([heads, KV_HEADS, KV_HEADS])
    if has_norms:
        q, k = norm(q, w[6], eps), norm(k, w[7], eps)
    cache[0].index_copy_(1, position, rotate(k, cos, sin).unsqueeze(1))
    cache[1].index_copy_(1, position, v.unsqueeze(1))
    q = rotate(q, cos, sin).view(1, heads, 1, dim)
    y = F.scaled_dot_product_attention(q, cache[0].unsqueeze(0), cache[1].unsqueeze(0),
                                       attn_mask=mask, enable_gqa=True)
    x = x + F.linear(y.view(1, -1), w[2])
    gate, up = F.linear(norm(x, w[3], eps), w[4]).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, w[5])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    c = json.load(open(args.config))
    hidden, inner, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    heads, dim, eps = c["num_attention_heads"], c["head_dim"], c["rms_norm_eps"]
    torch.manual_seed(0)
    made = dict(dtype=torch.bfloat16, device="cuda")
    matrix = lambda rows, columns: torch.randn(rows, columns, **made) * columns ** -0.5
    ones = lambda length: torch.ones(length, **made)
    layers = [(ones(hidden), matrix((heads + 2 * KV_HEADS) * dim, hidden),
               matrix(hidden, heads * dim), ones(hidden), matrix(2 * inner, hidden),
               matrix(hidden, inner), ones(dim), ones(dim))
              for _ in range(c["num_hidden_layers"])]
    caches = [torch.zeros(2, KV_HEADS, args.context, dim, **made) for _ in layers]
    table = matrix(vocab, hidden)
    head = table if c["tie_word_embeddings"] else matrix(vocab, hidden)
    last = ones(hidden)
    step = torch.arange(args.context, device="cuda")
    turn = step[:, None] * c["rope_theta"] ** (-torch.arange(0, dim, 2, device="cuda") / dim)
    cos, sin = turn.cos().bfloat16(), turn.sin().bfloat16()
    token = torch.zeros(1, dtype=torch.long, device="cuda")
    position = torch.full((1,), args.prompt, dtype=torch.long, device="cuda")
    has_norms = c["model_type"] == "qwen3"
    compiled = torch.compile if args.compile else lambda function: function
    run_layer = compiled(layer)
    choose = compiled(lambda x: F.linear(norm(x, last, eps), head).argmax(-1))

    def decode():
        x = F.embedding(token, table)
        mask = (step <= position).view(1, 1, 1, -1)
        turns = (cos.index_select(0, position), sin.index_select(0, position))
        for weights, cache in zip(layers, caches):
            x = run_layer(x, weights, cache, position, mask, *turns, heads, dim, eps, has_norms)
        token.copy_(choose(x))
        position.add_(1)

    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                decode()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decode()
        position.fill_(args.prompt)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(args.tokens + 1)]
        for mark in marks:
            mark.record()
            graph.replay()
        torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) * 1e3 for a, b in zip(marks, marks[1:]))
    at = lambda share: times[int(share * (len(times) - 1))]
    print(json.dumps({"torch": torch.__version__,
                      "tpot_us": {"p50": at(0.5), "p99": at(0.99)}}))


main()
