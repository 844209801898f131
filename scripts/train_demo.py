#!/usr/bin/env python3
# Pinned versions (CPython 3.11, CPU):
#   torch==2.15.0  numpy==2.4.6  safetensors==0.8.0  tokenizers==0.23.3
"""Makes the demo model: a small Qwen3 trained on a synthetic market tape.

The tape comes from a hidden Markov model with known tables, so the best possible loss is known:
an exact forward filter gives -log p(token | earlier tokens) for every token. Training succeeds
when the saved bf16 model is within 3 % of that floor on held-out streams.

The generator uses integers only (SplitMix64 and 16-bit probability tables), so that it can be
rewritten in another language bit for bit. A stream draws its first regime once; then each line
costs six draws, in this order: regime, event, tick, echo, size, gap.

  python scripts/train_demo.py --out model/demo           train, evaluate, write all but README.md
  python scripts/train_demo.py --out model/demo --check   re-evaluate the saved file, exit 1 if bad
"""
import argparse
import functools
import hashlib
import json
import math
import pathlib
import sys
import time

import numpy as np
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models, pre_tokenizers, processors
from torch import nn

# ---- vocabulary: a word carries its leading space, so decoding is plain concatenation ----------
TICK_MAX = 15
SIZES = [1, 2, 3, 5, 10, 15, 20, 25, 30, 40, 50, 60, 75, 80, 100, 120, 125, 150, 200, 250, 300,
         400, 500, 600, 750, 800, 1000, 1500, 2000, 2500, 3000, 5000]
GAPS_MS = [0, 1, 2, 3, 4, 5, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 300, 500,
           1000]
SPECIALS = ["<unk>", "<|tape|>", "<eos>"]
TICK_WORDS = [" 0" if t == 0 else f" {t:+d}" for t in range(-TICK_MAX, TICK_MAX + 1)]
VOCAB = (SPECIALS + ["\n", "BID", "ASK", "TRADE", "CANCEL", " BID", " ASK"] + TICK_WORDS
         + [f" x{s}" for s in SIZES] + [f" {g}ms" for g in GAPS_MS])
ID = {word: i for i, word in enumerate(VOCAB)}
BOS, EOS, NEWLINE = ID["<|tape|>"], ID["<eos>"], ID["\n"]
TICK_FIRST, SIZE_FIRST, GAP_FIRST = ID[TICK_WORDS[0]], ID[f" x{SIZES[0]}"], ID[f" {GAPS_MS[0]}ms"]

# ---- the generator's tables -------------------------------------------------------------------
REGIMES = ["calm", "up", "down", "volatile"]
EVENTS = ["BID", "ASK", "TRADE BID", "TRADE ASK", "CANCEL BID", "CANCEL ASK"]
NO_EVENT = len(EVENTS)  # stands for "previous event" on the first line of a stream
LEAD_ID = np.array([ID[e.split()[0]] for e in EVENTS])
SIDE_ID = np.array([ID[" " + e.split()[1]] if " " in e else -1 for e in EVENTS])
SCALE = 1 << 16  # every probability is an integer over this

# Symmetric, so the stationary distribution of the regime is exactly uniform. Mean stay: 24 lines.
REGIME_LEAVE = [[0, 1000, 1000, 700], [1000, 0, 400, 1200], [1000, 400, 0, 1200],
                [700, 1200, 1200, 0]]
EVENT_BASE = [[30, 30, 6, 6, 14, 14], [34, 10, 4, 30, 6, 16], [10, 34, 30, 4, 16, 6],
              [12, 12, 22, 22, 16, 16]]
# Added to EVENT_BASE after the previous event: replies, order splitting, replaced orders.
EVENT_FOLLOW = [[0, 40, 0, 0, 30, 0], [40, 0, 0, 0, 0, 30], [0, 20, 60, 0, 0, 0],
                [20, 0, 0, 60, 0, 0], [60, 0, 0, 0, 0, 10], [0, 60, 0, 0, 10, 0],
                [0, 0, 0, 0, 0, 0]]
TICK_CENTRE = [[-2, 2, -1, 1, -4, 4], [1, 4, 0, 2, -2, 6], [-4, -1, -2, 0, -6, 2],
               [-5, 5, -3, 3, -8, 8]]
TICK_DECAY = [7, 8, 8, 11]  # sixteenths kept per tick away from the centre
SIZE_CENTRE = [18, 18, 10, 10, 14, 14]
SIZE_SHIFT = [0, 2, 2, -4]
SIZE_DECAY = 11
SIZE_ROUND = {10, 50, 100, 200, 500, 1000}  # four times as likely as the smooth curve says
GAP_CENTRE = [14, 8, 8, 3]
GAP_SOONER = [0, 0, 2, 2, 0, 0]
GAP_DECAY = 10
# The next event repeats the size of the line before with probability 1/2: (previous, next).
ECHO_PAIRS = [(2, 2), (3, 3), (0, 4), (1, 5)]


def normalise(weights):
    """Scales integer weights to sum to SCALE exactly; the largest entry takes the remainder."""
    total = sum(weights)
    row = [w * SCALE // total for w in weights]
    row[row.index(max(row))] += SCALE - sum(row)
    return row


def peak(count, centre, decay):
    """Two-sided geometric weights around `centre`: decay/16 per step, integer division."""
    powers = [1 << 20]
    while len(powers) < 2 * count:
        powers.append(powers[-1] * decay // 16)
    return [powers[abs(i - centre)] for i in range(count)]


def build_tables():
    """Probability tables over SCALE: regime [regime, next], event [regime, previous, event],
    tick, size and gap [regime, event, index]; and echo [previous, event] bool."""
    def per_event(row):
        return [[normalise(row(r, e)) for e in range(len(EVENTS))] for r in range(len(REGIMES))]

    def size_row(r, e):
        smooth = peak(len(SIZES), SIZE_CENTRE[e] + SIZE_SHIFT[r], SIZE_DECAY)
        return [4 * w if s in SIZE_ROUND else w for w, s in zip(smooth, SIZES)]

    tables = {
        "regime": [[SCALE - sum(row) if r == s else leave for s, leave in enumerate(row)]
                   for r, row in enumerate(REGIME_LEAVE)],
        "event": [[normalise([b + f for b, f in zip(base, follow)]) for follow in EVENT_FOLLOW]
                  for base in EVENT_BASE],
        "tick": per_event(lambda r, e: peak(2 * TICK_MAX + 1, TICK_MAX + TICK_CENTRE[r][e],
                                            TICK_DECAY[r])),
        "size": per_event(size_row),
        "gap": per_event(lambda r, e: peak(len(GAPS_MS), GAP_CENTRE[r] - GAP_SOONER[e],
                                           GAP_DECAY))}
    tables = {name: np.array(table, dtype=np.int64) for name, table in tables.items()}
    assert all((t.sum(-1) == SCALE).all() and (t >= 0).all() for t in tables.values())
    echo = np.zeros((NO_EVENT + 1, len(EVENTS)), dtype=bool)
    echo[tuple(np.array(ECHO_PAIRS).T)] = True
    return tables, echo


TABLES, ECHO = build_tables()
CUMULATIVE = {name: table.cumsum(-1) for name, table in TABLES.items()}


class SplitMix64:
    """One independent SplitMix64 generator per stream, advanced together."""
    GAMMA = np.uint64(0x9E3779B97F4A7C15)

    def __init__(self, seed, split, first, count):
        """Streams `first..first+count` of a split; the key is mixed, so neighbours differ."""
        index = np.arange(first, first + count, dtype=np.uint64)
        self.state = self.mix(index + np.uint64((seed << 48) + (split << 40))) * self.GAMMA

    @staticmethod
    def mix(z):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    def draw16(self):
        """The top 16 bits of the next output: uniform in 0..SCALE, end excluded."""
        self.state = self.state + self.GAMMA
        return (self.mix(self.state) >> np.uint64(48)).astype(np.int64)


def make_lines(rng, stream_count, line_count):
    """Samples tapes as arrays [stream, line] of event, tick, size and gap indices."""
    def pick(name, *index):
        return (CUMULATIVE[name][index] <= rng.draw16()[:, None]).sum(-1)

    lines = []
    regime = rng.draw16() >> 14  # uniform over four regimes, the stationary distribution
    previous = np.full(stream_count, NO_EVENT)
    size = np.zeros(stream_count, np.int64)
    for _ in range(line_count):
        regime = pick("regime", regime)
        event = pick("event", regime, previous)
        tick = pick("tick", regime, event)
        echo = ECHO[previous, event] & (rng.draw16() < SCALE // 2)
        size = np.where(echo, size, pick("size", regime, event))
        gap = pick("gap", regime, event)
        lines.append((event, tick, size, gap))
        previous = event
    return dict(zip(("event", "tick", "size", "gap"), np.array(lines).transpose(1, 2, 0)))


def filter_slots(lines, use_memory=True):
    """Exact log p(slot | everything before it) [stream, line, 6] by forward filtering.
    `use_memory=False` forgets the regime after every line, as a baseline."""
    event = lines["event"]
    stream_count, line_count = event.shape
    p = {name: table / SCALE for name, table in TABLES.items()}
    lead_of = np.array([[a == b for b in LEAD_ID] for a in LEAD_ID], dtype=float)
    lead = np.einsum("rpe,fe->rpf", p["event"], lead_of)  # chance of the first word of event f
    log_p = np.zeros((stream_count, line_count, 6))
    belief = np.full((stream_count, len(REGIMES)), 1 / len(REGIMES))
    previous, size_before = np.full(stream_count, NO_EVENT), np.zeros(stream_count, np.int64)
    for n in range(line_count):
        e, size = event[:, n], lines["size"][:, n]
        joint = belief @ p["regime"]
        own = p["size"][:, e, size].T
        echoed = 0.5 * own + 0.5 * (size == size_before)[:, None]
        first = lead[:, previous, e].T
        factors = [first, p["event"][:, previous, e].T / first,
                   p["tick"][:, e, lines["tick"][:, n]].T,
                   np.where(ECHO[previous, e][:, None], echoed, own),
                   p["gap"][:, e, lines["gap"][:, n]].T]
        for slot, factor in enumerate(factors):
            joint = joint * factor
            total = joint.sum(-1, keepdims=True)
            log_p[:, n, slot] = np.log(total[:, 0])
            joint = joint / total
        belief = joint if use_memory else np.full_like(joint, 1 / len(REGIMES))
        previous, size_before = e, size
    return log_p


def make_streams(seed, split, first, count, token_count, floors=()):
    """Token streams [stream, token], each <|tape|> then lines, cut at `token_count`; then for each
    entry of `floors` (a `use_memory` flag) the true log p of every token."""
    lines = make_lines(SplitMix64(seed, split, first, count), count, -(-token_count // 5))
    # Six slots per line; the side is absent (-1) where the first word says it.
    slots = np.stack([LEAD_ID[lines["event"]], SIDE_ID[lines["event"]],
                      lines["tick"] + TICK_FIRST, lines["size"] + SIZE_FIRST,
                      lines["gap"] + GAP_FIRST, np.full_like(lines["gap"], NEWLINE)],
                     axis=-1).reshape(count, -1)
    position = np.cumsum(slots >= 0, axis=1)  # <|tape|> is position 0
    keep = (slots >= 0) & (position < token_count)
    row = np.nonzero(keep)[0]
    results = []
    for values, start in [(slots, BOS)] + [(filter_slots(lines, f), 0.0) for f in floors]:
        flat = np.full((count, token_count), start, values.dtype)
        flat[row, position[keep]] = values.reshape(count, -1)[keep]
        results.append(flat)
    return results


# ---- the model --------------------------------------------------------------------------------
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": len(VOCAB),
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu",
    "rms_norm_eps": 1e-06, "rope_theta": 1000000, "rope_scaling": None,
    "max_position_embeddings": 1024, "tie_word_embeddings": True, "attention_bias": False,
    "attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": None,
    "max_window_layers": 6, "initializer_range": 0.02, "use_cache": True,
    "torch_dtype": "bfloat16", "bos_token_id": BOS, "eos_token_id": EOS,
}
INIT_STD = 0.04
RmsNorm = functools.partial(nn.RMSNorm, eps=CONFIG["rms_norm_eps"])


def rotate(x, cos, sin):
    """Half-split rotary embedding over the whole head; x is [batch, head, position, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim, hidden = c["head_dim"], c["hidden_size"]
        heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        q_dim, kv_dim = heads * self.head_dim, kv_heads * self.head_dim
        self.group = heads // kv_heads
        self.q_proj = nn.Linear(hidden, q_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, hidden, bias=False)
        self.q_norm, self.k_norm = RmsNorm(self.head_dim), RmsNorm(self.head_dim)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        q, k, v = (proj(x).view(batch, length, -1, self.head_dim)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = rotate(self.q_norm(q).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(k).transpose(1, 2), cos, sin)
        k, v = (t.repeat_interleave(self.group, dim=1) for t in (k, v.transpose(1, 2)))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        hidden, inner = c["hidden_size"], c["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), Mlp(c)
        self.input_layernorm = RmsNorm(c["hidden_size"])
        self.post_attention_layernorm = RmsNorm(c["hidden_size"])

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3(nn.Module):
    """Module names give the tensor names of the file once `model.` is put in front."""
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = RmsNorm(c["hidden_size"])
        half = torch.arange(0, c["head_dim"], 2, dtype=torch.float32) / c["head_dim"]
        self.inv_freq = c["rope_theta"] ** -half
        depth = math.sqrt(2 * c["num_hidden_layers"])
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # Smaller writes into the residual keep its size steady with depth.
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=INIT_STD / (depth if writes else 1.0))

    def forward(self, ids):
        angle = torch.arange(ids.shape[1], dtype=torch.float32)[:, None] * self.inv_freq
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, angle.cos(), angle.sin())
        return F.linear(self.norm(x), self.embed_tokens.weight)



# ---- training and evaluation ------------------------------------------------------------------
TRAIN, HELD_OUT = 0, 1
CONTEXT = 256  # the length the headline figures are taken at
RATIO_MAX, BYTES_MAX = 1.03, 4_000_000
WARM = 32      # figures "from position 32" skip the part where the regime is still unknown
# (share of the tokens, stream length, streams per step); the last part teaches long positions.
PHASES = [(0.75, 256, 16), (0.25, 1024, 4)]


def learning_rate(done, peak_rate):
    """Linear warm-up over 2 % of the tokens, then cosine; `done` is the share of tokens."""
    return peak_rate * min(1.0, done / 0.02 + 1e-3) * (0.51 + 0.49 * math.cos(math.pi * done))


def train(args):
    torch.manual_seed(args.seed)
    model = Qwen3(CONFIG)
    groups = [{"params": [p for p in model.parameters() if p.dim() == dim], "weight_decay": decay}
              for dim, decay in ((2, 0.05), (1, 0.0))]  # no decay on the norms' gains
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-9)
    tokens_done, stream, step, mean_excess, started = 0, 0, 0, 0.0, time.time()
    for share, length, batch in PHASES:
        phase_end = tokens_done + share * args.tokens
        while tokens_done < phase_end:
            ids, floor = make_streams(args.seed, TRAIN, stream, batch, length + 1, (True,))
            ids = torch.from_numpy(ids)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(tokens_done / args.tokens, args.lr)
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            tokens_done, stream, step = tokens_done + batch * length, stream + batch, step + 1
            excess = loss.item() / -floor[:, 1:].mean() - 1
            mean_excess = excess if step == 1 else 0.95 * mean_excess + 0.05 * excess
            if step % 25 == 0:
                print(f"step {step:5d}  {tokens_done / 1e6:6.2f} Mtok  loss {loss.item():.4f}  "
                      f"excess {mean_excess:6.2%}  {time.time() - started:6.0f} s", flush=True)
    return model, {"seconds": round(time.time() - started), "steps": step, "tokens": tokens_done,
                   "streams": stream, "threads": args.threads, "seed": args.seed}


@torch.no_grad()
def token_losses(model, ids, batch=32):
    """-log p of every token but the first, [stream, token - 1], in f64."""
    parts = [F.cross_entropy(model(part[:, :-1]).transpose(1, 2), part[:, 1:], reduction="none")
             for part in torch.from_numpy(ids).split(batch)]
    return torch.cat(parts).double().numpy()


def compare(model, args, stream_count, context):
    """Model and floor over the same held-out tokens, which see the same context."""
    ids, log_p, log_p_static = make_streams(args.seed, HELD_OUT, 0, stream_count, context + 1,
                                            (True, False))
    # Position 0 is <|tape|>, which nobody predicts; the last predicted position is `context`.
    losses = np.stack([token_losses(model, ids), -log_p[:, 1:], -log_p_static[:, 1:]])
    edges = [e for e in (1, WARM, 128, 256, 512, 1024) if e <= context]
    ranges = [(1, context), (WARM, context)] + [(a, b - (b < context))
                                                for a, b in zip(edges, edges[1:])]
    rows = []
    for first, last in ranges:
        part = losses[:, :, first - 1:last]
        loss, floor, no_memory = part.mean((1, 2)).tolist()
        rows.append({"positions": f"{first} to {last}", "tokens": part[0].size,
                     "loss_nats": round(loss, 5), "loss_bits": round(loss / math.log(2), 5),
                     "floor_nats": round(floor, 5), "floor_bits": round(floor / math.log(2), 5),
                     "no_memory_nats": round(no_memory, 5), "ratio": round(loss / floor, 5)})
    return {"context": context, "streams": stream_count, "rows": rows}


@torch.no_grad()
def generate(model, ids, count, seed=None):
    """Greedy (lowest id on ties) or, with a seed, sampled at temperature 1."""
    ids, rng = list(ids), None if seed is None else torch.Generator().manual_seed(seed)
    for _ in range(count):
        logits = model(torch.tensor([ids]))[0, -1]
        ids.append(int(logits.argmax()) if rng is None else
                   int(torch.multinomial(logits.softmax(-1), 1, generator=rng)))
    return ids


# ---- files ------------------------------------------------------------------------------------
PROMPT = "BID +1 x200 5ms\nTRADE ASK +2 x100 2ms\n"


def make_tokenizer():
    tokenizer = tokenizers.Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    # A match is a newline or a word with at most one space before it; other spaces are dropped.
    words = tokenizers.Regex(r"\n| ?[^ \n]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, "removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|tape|> $A", pair="<|tape|> $A $B", special_tokens=[("<|tape|>", BOS)])
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def check_tokenizer(tokenizer, ids):
    """Encoding the decoded tape must give the ids back; unknown words must be <unk>."""
    for row in ids.tolist():
        text = tokenizer.decode(row, skip_special_tokens=True)
        assert tokenizer.encode(text).ids == row and "".join(VOCAB[i] for i in row[1:]) == text
    assert tokenizer.encode("HELLO +1\n").ids == [BOS, ID["<unk>"], ID[" +1"], NEWLINE]


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def save_model(model, out):
    state = {f"model.{name}": tensor.detach().to(torch.bfloat16).contiguous()
             for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # the writer makes it private
    write_json(out / "config.json", CONFIG)
    write_json(out / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<|tape|>",
        "eos_token": "<eos>", "add_bos_token": True, "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"]})
    tokenizer = make_tokenizer()
    check_tokenizer(tokenizer, make_streams(0, HELD_OUT, 0, 64, CONTEXT)[0])
    tokenizer.save(str(out / "tokenizer.json"))


def load_model(out):
    """The saved bf16 weights; arithmetic stays f32."""
    model = Qwen3(json.loads((out / "config.json").read_text()))
    state = safetensors.torch.load_file(out / "model.safetensors")
    model.load_state_dict({k.removeprefix("model."): v.float() for k, v in state.items()})
    return model.eval()


def make_report(model, out, args, training):
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    prompt_ids = tokenizer.encode(PROMPT).ids
    blob, count = (out / "model.safetensors").read_bytes(), len(prompt_ids)
    greedy = generate(model, prompt_ids, 96)
    sampled = generate(model, [BOS], 128, seed=7)
    return {
        "what": "a toy trained on a synthetic tape, not on any market",
        "command": f"python scripts/train_demo.py --out model/demo --seed {args.seed} "
                   f"--tokens {args.tokens} --lr {args.lr} --threads {args.threads}",
        "versions": {m.__name__: m.__version__.split("+")[0]
                     for m in (torch, np, safetensors, tokenizers)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "model_bytes": len(blob), "model_sha256": hashlib.sha256(blob).hexdigest(),
        "training": training, "arithmetic": "saved bf16 weights, f32 arithmetic",
        "held_out": [compare(model, args, 1024, CONTEXT),
                     compare(model, args, 256, CONFIG["max_position_embeddings"])],
        "greedy": {"prompt": PROMPT, "prompt_ids": prompt_ids,
                   "first_16_ids": greedy[count:count + 16], "text": tokenizer.decode(greedy)},
        "sampled": {"seed": 7, "text": tokenizer.decode(sampled)},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("model/demo"))
    parser.add_argument("--seed", type=int, default=1, help="0..65535; data and initial weights")
    parser.add_argument("--tokens", type=int, default=7_000_000, help="training tokens")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="only evaluate the saved model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.check:
        result = compare(load_model(args.out), args, 128, CONTEXT)
    else:
        model, training = train(args)
        save_model(model, args.out)
        report = make_report(load_model(args.out), args.out, args, training)
        write_json(args.out / "report.json", report)
        result = report["held_out"][0]
    for row in result["rows"]:
        print(f"{row['positions']:22s} loss {row['loss_nats']:.4f}  floor {row['floor_nats']:.4f}"
              f"  ratio {row['ratio']:.4f}  no memory {row['no_memory_nats']:.4f}")
    too_large = (args.out / "model.safetensors").stat().st_size >= BYTES_MAX
    sys.exit(1 if too_large or any(r["ratio"] > RATIO_MAX for r in result["rows"][:2]) else 0)


if __name__ == "__main__":
    main()
