#!/usr/bin/env python3
"""Reference of the forward pass and of hybrid-head decoding (docs/SPARSE.md), in numpy float64.

It reads a Hugging Face folder (llama, qwen2, qwen3; both config layouts) and recomputes everything from
the formulas: nothing here calls the engine or transformers, so it can disagree with either. As a module
it also serves tools/make-model-fixtures.py, which checks it against transformers.

    python tools/hybrid_ref.py            rewrites tests/fixtures/tiny-hybrid/{cases,roles}
    python tools/hybrid_ref.py --check    recomputes the cases and compares them with the files

cases/cases.json   one object per case: ids, decode_from, options, roles file, hand-computable sums, and
                   where its rows and its sets lie in the two arrays
cases/logits.npy   float32 [rows, n_vocab]: the logits of the decode steps
cases/sets.npy     int32 [n]: records position, layer, head, count, tokens ascending; a dense step is one
                   record with layer = head = -1 and count 0
"""
import argparse
import json
import math
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests/fixtures/tiny-hybrid"


# ---- reading a folder ------------------------------------------------------------------------------
def load_tensors(folder):
    """All tensors of a folder as float64; shards through the index."""
    folder = pathlib.Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    out = {}
    for name in files:
        raw = (folder / name).read_bytes()
        n = int.from_bytes(raw[:8], "little")
        head = json.loads(raw[8:8 + n])
        head.pop("__metadata__", None)
        for key, t in head.items():
            a, b = t["data_offsets"]
            buf = raw[8 + n + a:8 + n + b]
            if t["dtype"] == "F32":
                x = np.frombuffer(buf, "<f4").astype(np.float64)
            elif t["dtype"] == "BF16":
                x = (np.frombuffer(buf, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
            else:
                raise SystemExit(f"{name}: {key}: dtype {t['dtype']}")
            out[key] = x.reshape(t["shape"])
    return out


def rope_inv_freq(cfg, dim):
    """Inverse frequencies [dim/2], f32, and the attention factor, for no scaling, linear, llama3 and yarn.

    Published models were trained and are run with f32 frequencies and f32 angles, so those roundings are
    part of what a model computes; everything after them is float64 here."""
    rope = dict(cfg.get("rope_scaling") or {})
    rope.update(cfg.get("rope_parameters") or {})
    theta = rope.get("rope_theta", cfg.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    inv = 1 / np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    inv, attn = scale_inv_freq(inv.astype(np.float64), rope, kind, theta, dim)
    return inv.astype(np.float32), attn


def scale_inv_freq(inv, rope, kind, theta, dim):
    if kind == "default":
        return inv, 1.0
    factor = rope["factor"]
    if kind == "linear":
        return inv / factor, 1.0
    orig = rope["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = orig * inv / (2 * math.pi)              # rotations over the trained window
        keep = np.clip((turns - low) / (high - low), 0, 1)  # 0: long waves, divided by factor; 1: kept
        return inv * keep + inv / factor * (1 - keep), 1.0
    if kind == "yarn":
        def dim_of(turns):
            return dim * math.log(orig / (turns * 2 * math.pi)) / (2 * math.log(theta))
        lo = max(math.floor(dim_of(rope.get("beta_fast") or 32)), 0)
        hi = min(math.ceil(dim_of(rope.get("beta_slow") or 1)), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - lo) / (max(hi - lo, 0.001)), 0, 1)  # 1: interpolated
        attn = rope.get("attention_factor") or 0.1 * math.log(factor) + 1
        return inv / factor * ramp + inv * (1 - ramp), attn
    raise SystemExit(f"rope type {kind}")


# ---- rounding of a cache row, as the engine stores it ------------------------------------------------
def to_bf16(x):
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    u = u + 0x7FFF + ((u >> 16) & 1)                    # to nearest, ties to even
    return ((u >> 16) << 16).astype(np.uint32).view(np.float32).astype(np.float64)


def to_kv8(x):
    """int8 with one f16 scale per 32 values of a row."""
    out = np.empty_like(x)
    for a in range(0, x.shape[-1], 32):
        b = x[..., a:a + 32]
        d = np.abs(b).max(-1, keepdims=True) / 127
        q = np.rint(np.divide(b, d, out=np.zeros_like(b), where=d > 0))
        out[..., a:a + 32] = q * d.astype(np.float16).astype(np.float64)
    return out


KV_ROUND = {
    "f32": lambda x: x.astype(np.float32).astype(np.float64),
    "f16": lambda x: x.astype(np.float16).astype(np.float64),
    "bf16": to_bf16,
    "q8": to_kv8,
}


# ---- the model ---------------------------------------------------------------------------------------
class Model:
    def __init__(self, folder, tensors=None, cfg=None):
        self.cfg = c = cfg or json.loads((pathlib.Path(folder) / "config.json").read_text())
        self.t = tensors or load_tensors(folder)
        self.n_layer, self.n_head = c["num_hidden_layers"], c["num_attention_heads"]
        self.n_kv = c["num_key_value_heads"]
        self.dim = c.get("head_dim") or c["hidden_size"] // self.n_head
        self.group = self.n_head // self.n_kv
        self.eps = c["rms_norm_eps"]
        self.inv, self.rope_attn = rope_inv_freq(c, self.dim)
        self.scale = self.dim ** -0.5

    def w(self, name):
        return self.t["model." + name]

    def head(self):
        return self.t.get("lm_head.weight", self.t["model.embed_tokens.weight"])

    def norm(self, x, w):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * w

    def rope(self, x, pos):                             # [n, heads, dim], pairs (i, i + dim/2)
        ang = (np.asarray(pos, np.float32)[:, None] * self.inv).astype(np.float64)
        cos, sin = np.cos(ang)[:, None] * self.rope_attn, np.sin(ang)[:, None] * self.rope_attn
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def qkv(self, l, x, pos):
        p, n = f"layers.{l}.", x.shape[0]
        h = self.norm(x, self.w(p + "input_layernorm.weight"))
        out = []
        for name, heads in (("q", self.n_head), ("k", self.n_kv), ("v", self.n_kv)):
            y = h @ self.w(p + f"self_attn.{name}_proj.weight").T
            bias = self.t.get(f"model.{p}self_attn.{name}_proj.bias")
            y = (y if bias is None else y + bias).reshape(n, heads, self.dim)
            qk = self.t.get(f"model.{p}self_attn.{name}_norm.weight")
            if qk is not None:
                y = self.norm(y, qk)
            out.append(y if name == "v" else self.rope(y, pos))
        return out

    def mlp(self, l, x):
        p = f"layers.{l}.mlp."
        h = self.norm(x, self.w(f"layers.{l}.post_attention_layernorm.weight"))
        g = h @ self.w(p + "gate_proj.weight").T
        return x + (g / (1 + np.exp(-g)) * (h @ self.w(p + "up_proj.weight").T)) @ self.w(p + "down_proj.weight").T

    def logits(self, x):
        return self.norm(x, self.w("norm.weight")) @ self.head().T

    def cache(self):
        return [np.zeros((0, 2, self.n_kv, self.dim)) for _ in range(self.n_layer)]

    def append(self, kv, l, k, v, rnd):
        kv[l] = np.concatenate([kv[l], np.stack([rnd(k), rnd(v)], 1)])

    def prefill(self, ids, kv=None, rnd=KV_ROUND["f32"], watch=0, mass=None):
        """Dense causal forward of ids behind the cache; logits [n, vocab]. The cache grows. mass [n_layer][n_kv]: attention of the
        last `watch` rows, mean over them and over a KV head's query heads."""
        kv = self.cache() if kv is None else kv
        past, n = kv[0].shape[0], len(ids)
        pos = np.arange(past, past + n)
        x = self.w("embed_tokens.weight")[np.asarray(ids)]
        seen = np.arange(past + n)[None, :] <= pos[:, None]
        for l in range(self.n_layer):
            q, k, v = self.qkv(l, x, pos)
            self.append(kv, l, k, v, rnd)
            kk, vv = kv[l][:, 0], kv[l][:, 1]
            o = np.empty_like(q)
            for h in range(self.n_head):
                s = q[:, h] @ kk[:, h // self.group].T * self.scale
                s = np.where(seen, s, -np.inf)
                p = np.exp(s - s.max(-1, keepdims=True))
                o[:, h] = p @ vv[:, h // self.group] / p.sum(-1, keepdims=True)
                if watch:
                    mass[l][h // self.group] += (p / p.sum(-1, keepdims=True))[-watch:].mean(0) / self.group
            x = x + o.reshape(n, -1) @ self.w(f"layers.{l}.self_attn.o_proj.weight").T
            x = self.mlp(l, x)
        return self.logits(x)

    # ---- 1.11, with donors ---------------------------------------------------------------------------
    def attend_set(self, q, kv_l, h, tokens):           # q [dim]; exact softmax over the set
        k, v = kv_l[tokens, 0, h], kv_l[tokens, 1, h]
        s = k @ q * self.scale
        p = np.exp(s - s.max())
        return p @ v / p.sum()

    def decode_hybrid(self, tok, kv, roles, share, opt, rnd, log, kept=None):
        """One hybrid step; fills log["sets"], log["tokens"] (read per head), log["margin"]. kept: (layer, head) -> blocks."""
        pos = kv[0].shape[0]
        budget, S = effective_budget(opt, pos + 1), pos + 1
        dense = opt["rule"] in ("topk", "ratio") and S <= budget
        log.update(sets=[], dense=dense, position=pos, margin=math.inf,
                   tokens=np.zeros((self.n_layer, self.n_kv), np.int64))
        if opt["rule"] not in ("topk", "ratio"):
            share = [[1024] * self.n_kv] * self.n_layer
        parts = {}                                      # head that picks -> the shares its sets are read at
        for row, part in zip(roles, share):
            for r, s in zip(row, part):
                if isinstance(r, tuple):
                    parts.setdefault(r, set()).add(s)
        sel, own, late = {}, {}, []
        readers = lambda r: [(a, b) for a in range(self.n_layer) for b in range(self.n_kv) if roles[a][b] == r]
        x = self.w("embed_tokens.weight")[[tok]]
        if kept is not None and not dense:              # windows are sets too, but in the first layer
            for r in readers("window"):
                if r[0] > 0:
                    own[r], _ = choose(np.arange(S), S, shared_budget(opt, budget, share[r[0]][r[1]]), opt, self.scale, kept.get(r, ()))
                    late.append((*r, own[r]))
        for l in range(self.n_layer):
            q, k, v = self.qkv(l, x, [pos])
            self.append(kv, l, k, v, rnd)
            o = np.empty((self.n_head, self.dim))
            fresh = {}
            for h in range(self.n_kv):
                role = roles[l][h]
                if dense or role == "retrieval":
                    tokens = np.arange(S)
                elif (l, h) in own:
                    tokens = own[l, h]
                elif role == "window":
                    tokens = window(S, opt["sinks"], shared_budget(opt, budget, share[l][h]))
                else:                                   # of an earlier layer, this step
                    tokens = sel[role, share[l][h]]
                log["tokens"][l, h] = len(tokens)
                for g in range(h * self.group, (h + 1) * self.group):
                    o[g] = self.attend_set(q[0, g], kv[l], h, tokens)
                if kept is not None and not dense and (l, h) in parts:
                    qbar = q[0, h * self.group:(h + 1) * self.group].mean(0)
                    score = kv[l][:, 0, h] @ qbar
                    for r in readers((l, h)):           # of later layers all
                        own[r], margin = choose(score, S, shared_budget(opt, budget, share[r[0]][r[1]]), opt, self.scale, kept.get(r, ()))
                        log["margin"] = min(log["margin"], margin)
                        log["sets"].append((l, h, own[r]))
                    most, margin = choose(score, S, shared_budget(opt, budget, max(parts[l, h])), opt, self.scale)
                    log["margin"] = min(log["margin"], margin)
                    log["sets"].append((l, h, most))
                    continue
                for s in sorted(parts.get((l, h), ())) if not dense else ():
                    qbar = q[0, h * self.group:(h + 1) * self.group].mean(0)
                    fresh[(l, h), s], margin = choose(kv[l][:, 0, h] @ qbar, S, shared_budget(opt, budget, s), opt, self.scale)
                    log["margin"] = min(log["margin"], margin)
                    log["sets"].append((l, h, fresh[(l, h), s]))
            sel.update(fresh)
            x = x + o.reshape(1, -1) @ self.w(f"layers.{l}.self_attn.o_proj.weight").T
            x = self.mlp(l, x)
        log["sets"] += late
        return self.logits(x)[0]

    def observe(self, ids, kv, roles, share, opt, rnd):
        """A dense chunk whose last rows say what heads keep: last logits, (layer, head) -> blocks, how clear the cuts are."""
        S, block, margin, kept = kv[0].shape[0] + len(ids), opt["block"], math.inf, {}
        mass = np.zeros((self.n_layer, self.n_kv, S))
        row = self.prefill(ids, kv, rnd, min(opt["observe"], len(ids)), mass)[-1]
        first, last = -(-opt["sinks"] // block), (S - opt["recents"]) // block if opt["recents"] else -(-S // block)
        budget, least = effective_budget(opt, S), forced_tokens(opt)
        for l in range(self.n_layer):
            for h in range(self.n_kv):
                n = max(shared_budget(opt, budget, share[l][h]) - least, 0) * round(opt["keep"] * 1024) // 1024 // block
                units = {b: mass[l, h, b * block:(b + 1) * block].max() for b in range(first, last)}
                order = sorted(units, key=lambda b: (-units[b], b))
                kept[l, h] = order[:n]
                if roles[l][h] != "retrieval" and 0 < n < len(order):
                    margin = min(margin, (units[order[n - 1]] - units[order[n]]) / max(np.std(list(units.values())), 1e-9))
        return row, kept, margin


def effective_budget(opt, S):
    b = opt["budget"] or 0
    if opt["rule"] == "ratio":
        b = int((1.0 - opt["rule_value"]) * S)
    return max(b, opt["sinks"] + opt["recents"])


def forced_tokens(opt):
    """Sinks and recents, or the most tokens of blocks that hold them."""
    up = lambda n: -(-n // opt["block"]) * opt["block"]
    return opt["sinks"] + opt["recents"] if opt["block"] == 1 else up(opt["sinks"]) + up(opt["recents"] + opt["block"])


def shared_budget(opt, budget, share):
    """Of a set or window with a share of its own, a whole number of 1024ths of what the budget holds beyond the forced tokens."""
    if share == 1024:
        return budget
    least = forced_tokens(opt)
    return least + (budget - least) * share // 1024 if budget > least else budget


def window(S, sinks, budget):
    recent = max(S - (budget - sinks), 0)
    return np.union1d(np.arange(min(sinks, S)), np.arange(recent, S))


def choose(score, S, budget, opt, scale, kept=()):
    """Token set of a retrieval head and how clear its cut is (relative to the spread of the scores). kept: blocks that come first."""
    block, n_block = opt["block"], -(-S // opt["block"])
    bs = np.array([score[b * block:(b + 1) * block].max() for b in range(n_block)])
    order = np.lexsort((np.arange(n_block), -bs))       # best first, ties: lower position
    spread = max(float(score.std()), 1e-9)
    margin = math.inf
    if opt["rule"] in ("topk", "ratio"):
        forced = {t // block for t in range(S) if t < opt["sinks"] or t >= S - opt["recents"]}
        free = sorted((b for b in order if b not in forced), key=lambda b: b not in kept)  # stable: by score among both
        take = max(budget // block - len(forced), 0)
        picked = sorted(forced | set(free[:take]))
        if 0 < take < len(free) and (free[take - 1] in kept) == (free[take] in kept):
            margin = (bs[free[take - 1]] - bs[free[take]]) / spread
    else:                                               # probabilities are of tokens, whatever the block
        z = (opt["rule_scale"] or scale) * score
        p = np.exp(z - z.max())
        p /= p.sum()
        mass = np.array([p[b * block:(b + 1) * block].sum() for b in range(n_block)])
        peak = np.array([p[b * block:(b + 1) * block].max() for b in range(n_block)])
        if opt["rule"] == "topp":
            cut = np.cumsum(mass[order]) - mass[order]  # the mass before each block
            picked = sorted(order[cut <= opt["rule_value"]])
        else:
            cut = peak
            picked = sorted(np.nonzero(peak > opt["rule_value"])[0]) or [n_block - 1]
        margin = float(np.abs(cut - opt["rule_value"]).min() / max(opt["rule_value"], 1e-9))
        if 0 < len(picked) < n_block:                   # neighbours in the order must not be tied either
            margin = min(margin, (bs[order[len(picked) - 1]] - bs[order[len(picked)]]) / spread)
            if opt["rule"] == "threshold" and not (peak > opt["rule_value"]).any():
                margin = float((opt["rule_value"] - peak.max()) / opt["rule_value"])
    tokens = [t for b in picked for t in range(b * block, min((b + 1) * block, S))]
    return np.array(tokens), margin


def resolve(file):
    """Roles file to "retrieval", "window" or (layer, head): "sparse" is the nearest earlier of its index."""
    out, nearest = [], {}
    for l, row in enumerate(file["roles"]):
        out.append([])
        for h, r in enumerate(row):
            if r == "sparse":
                r = nearest[h]
            elif isinstance(r, list):
                r = tuple(r)
            out[-1].append(r)
        nearest.update({h: (l, h) for h, r in enumerate(row) if r == "retrieval"})
    return out


def run_case(m, ids, decode_from, roles, share, opt, rnd):
    """Teacher-forced decode; logits rows and one log per step."""
    kv, kept, seen = m.cache(), None, -1
    keeps = opt["keep"] > 0 and opt["rule"] in ("topk", "ratio") and any(r != "retrieval" for row in roles for r in row)
    keeps = keeps and (any(isinstance(r, tuple) for row in roles for r in row) or any(r == "window" for row in roles[1:] for r in row))
    start = math.inf                                    # how clear the cuts of the last observation are
    if decode_from and keeps:
        _, kept, start = m.observe(ids[:decode_from], kv, roles, share, opt, rnd)
        seen = decode_from
    elif decode_from:
        m.prefill(ids[:decode_from], kv, rnd)
    rows, logs = [], []
    for step, tok in enumerate(ids[decode_from:], 1):
        pos, log = kv[0].shape[0], {}
        n = opt["correct_every"] if opt["correct_every"] and step % opt["correct_every"] == 0 else 0
        rerun = n if opt["correct"] == "rerun" else 0
        if keeps and (seen < 0 or pos + 1 - seen >= max(opt["refresh"], seen // 64)) and pos + 1 > effective_budget(opt, pos + 1):
            rerun = max(rerun, 1, min(opt["observe"], opt["refresh"] // 2))
        if n or rerun:
            if rerun:                                   # reading B, or observation: the last tokens again, as one dense chunk
                rerun = min(rerun, pos + 1)
                for l in range(m.n_layer):
                    kv[l] = kv[l][:pos - (rerun - 1)]
                again = ids[pos - (rerun - 1):pos + 1]
                if keeps:
                    row, kept, start = m.observe(again, kv, roles, share, opt, rnd)
                    seen = pos + 1
                else:
                    row = m.prefill(again, kv, rnd)[-1]
            else:                                       # reading A: this step dense
                row = m.prefill([tok], kv, rnd)[-1]
            log = dict(sets=[], dense=True, position=pos, margin=math.inf,
                       tokens=np.full((m.n_layer, m.n_kv), pos + 1, np.int64))
        else:
            row = m.decode_hybrid(tok, kv, roles, share, opt, rnd, log, kept if keeps else None)
            log["margin"] = min(log["margin"], start)
        rows.append(row)
        logs.append(log)
    return np.array(rows), logs


# ---- the cases ---------------------------------------------------------------------------------------
R, W, S_ = "retrieval", "window", "sparse"


def random_donors(seed, n_layer, n_kv, n_retrieval, first_all=False):
    """n_retrieval heads anywhere, every other head a random earlier one of them or, rarely, the window."""
    rng = np.random.default_rng(seed)
    pick = set(rng.permutation(n_layer * n_kv)[:n_retrieval].tolist())
    pick |= set(range(n_kv)) if first_all else set()
    rows = []
    for l in range(n_layer):
        row = []
        for h in range(n_kv):
            earlier = sorted(r for r in pick if r < l * n_kv)
            if l * n_kv + h in pick:
                row.append(R)
            elif not earlier or rng.random() < 0.2:
                row.append(W)
            else:
                row.append([int(x) for x in divmod(earlier[rng.integers(len(earlier))], n_kv)])
        rows.append(row)
    return rows


def role_maps():
    same = {"same-sparse": [[R, R, R], [S_, R, S_], [S_, S_, R], [R, S_, S_], [S_, S_, S_]],
            "same-pure": [[R, R, R], [S_, S_, S_], [R, R, R], [S_, S_, S_], [R, S_, R]],   # n_l = 0 and n_l = all
            "same-min": [[R, R, R]] + [[S_, S_, S_]] * 4}
    maps = {k: ("same-index", v) for k, v in same.items()}
    for k, v in same.items():                           # the same maps, every donor named
        rows = resolve({"roles": v})
        maps[k.replace("same", "named")] = ("donor", [[list(r) if isinstance(r, tuple) else r for r in row] for row in rows])
    maps["all"] = ("donor", [[R] * 3] * 5)
    maps["window"] = ("donor", [[W] * 3] * 5)
    maps["cross"] = ("donor", [[R, W, R], [[0, 2], R, [0, 0]], [[1, 1], [0, 2], [1, 1]], [R, W, [0, 0]], [[3, 0], [1, 1], [0, 2]]])
    maps["lonely"] = ("donor", [[W, W, W], [W, R, W], [[1, 1], W, [1, 1]], [W, [1, 1], W], [R, R, [1, 1]]])  # two sets unread
    for i, n in enumerate((3, 6, 9)):
        maps[f"random-{n}"] = ("donor", random_donors(40 + i, 5, 3, n))
    return maps


def shares():
    """Maps with budgets per head: name -> (the map they belong to, shares; of retrieval heads: not looked at)."""
    rng = np.random.default_rng(11)
    many = [[float(x) for x in row] for row in rng.choice([0, 0, 0.25, 0.5, 1, 2.5], (5, 3))]
    return {"share-one": ("cross", [[1] * 3] * 5),
            "share-cross": ("cross", [[9, 0.5, 9], [0, 9, 2.5], [1, 0.25, 1.75], [9, 0, 0], [3, 1, 1]]),
            "share-same": ("same-min", [[9] * 3, [0, 1, 2.25], [0.5, 1, 0], [3, 0, 2], [0, 1, 1.25]]),
            "share-random": ("random-3", many)}


def write_roles(folder):
    folder.mkdir(parents=True, exist_ok=True)
    out = {}
    maps = role_maps()
    for name, (share, rows) in [*maps.items(), *((name, maps[of]) for name, (of, _) in shares().items())]:
        file = {"format": "longan-roles", "version": 1,
                "model": {"family": "0" * 32, "n_layer": 5, "n_head_kv": 3}, "share": share, "roles": rows,
                "n_retrieval": sum(r == R for row in rows for r in row),
                "made": {"by": "tools/hybrid_ref.py"}}
        if name in shares():
            file["budget_share"] = shares()[name][1]
        (folder / f"{name}.json").write_text(json.dumps(file) + "\n")
        out[name] = file
    return out


OPT = dict(rule="topk", rule_value=0.0, rule_scale=0.0, budget=24, sinks=4, recents=8, block=1, correct_every=0, correct="step", keep=0.0, observe=64, refresh=128)


def case_list():
    """(name, roles, prompt length, steps, options that differ from OPT)"""
    out = []

    def add(name, roles, n, steps, **opt):
        out.append((name, roles, n, steps, {**OPT, **opt}))

    for roles in ("all", "same-sparse", "same-pure", "same-min", "named-sparse", "cross", "lonely", "window",
                  "random-3", "random-6", "random-9"):
        add(f"topk-{roles}", roles, 60, 4)
    for roles in ("same-sparse", "cross"):
        add(f"ratio-half-{roles}", roles, 70, 4, rule="ratio", rule_value=0.5, budget=None)
        add(f"ratio-most-{roles}", roles, 159, 2, rule="ratio", rule_value=0.9, budget=None)  # k = 15 at S = 160
        add(f"topp-low-{roles}", roles, 50, 4, rule="topp", rule_value=0.4, budget=16)
        add(f"topp-high-{roles}", roles, 50, 4, rule="topp", rule_value=0.93, budget=16)
        add(f"threshold-{roles}", roles, 50, 4, rule="threshold", rule_value=0.03, budget=16)
        add(f"threshold-empty-{roles}", roles, 50, 4, rule="threshold", rule_value=0.7, budget=16)
        add(f"scale-{roles}", roles, 50, 4, rule="topp", rule_value=0.8, rule_scale=128 ** -0.5, budget=16)
        add(f"correct-step-{roles}", roles, 60, 7, correct_every=3)
        add(f"correct-rerun-{roles}", roles, 60, 7, correct_every=3, correct="rerun")
        add(f"least-{roles}", roles, 40, 3, budget=2)                       # raised to sinks + recents
        add(f"no-sinks-{roles}", roles, 40, 3, budget=10, sinks=0, recents=4)
        add(f"no-recents-{roles}", roles, 40, 3, budget=10, sinks=4, recents=0)
        add(f"free-{roles}", roles, 40, 3, budget=10, sinks=0, recents=0)   # the current token is not forced
        add(f"one-{roles}", roles, 0, 4, budget=1, sinks=0, recents=1)      # S = 1, 2, 3, 4
        add(f"first-{roles}", roles, 0, 6, budget=3, sinks=1, recents=1)    # S = 1 .. 6, dense up to 3
        for block in (16, 32, 64):
            add(f"block{block}-{roles}", roles, 254, 4, block=block, budget=112, sinks=4, recents=8)
    add("block16-edge-a", "cross", 63, 3, block=16, budget=48)              # S = 64, 65, 66
    add("block16-edge-b", "cross", 62, 3, block=16, budget=49)              # a budget that is no whole number of blocks
    add("block64-tight", "cross", 200, 2, block=64, budget=24)              # floor(budget / block) = 0: forced blocks only
    add("block16-topp", "cross", 100, 3, block=16, rule="topp", rule_value=0.6, budget=16)
    add("block16-threshold", "cross", 100, 3, block=16, rule="threshold", rule_value=0.03, budget=16)
    add("budget-edge", "cross", 22, 4)                                      # S = budget - 1 .. budget + 2
    add("dense-by-budget", "cross", 40, 3, budget=64)
    wide = dict(sinks=128, recents=256)
    add("S126", "cross", 125, 4, budget=64, sinks=32, recents=16)           # S = 126 .. 129
    add("S382", "random-6", 381, 5, budget=384, **wide)                     # S = 382 .. 386, forced sets alone
    add("S400", "same-sparse", 398, 4, budget=400, **wide)                  # budget - 1 .. budget + 2, defaults
    add("ratio-384", "cross", 448, 2, rule="ratio", rule_value=0.12, budget=None, **wide)
    for roles in ("share-one", "share-cross", "share-same", "share-random"):
        add(f"topk-{roles}", roles, 60, 4)
        add(f"least-{roles}", roles, 40, 3, budget=13)                      # one token beyond sinks and recents
        add(f"ratio-{roles}", roles, 70, 4, rule="ratio", rule_value=0.5, budget=None)
        add(f"edge-{roles}", roles, 22, 5)                                  # dense as long as the budget of all says
        add(f"block16-{roles}", roles, 254, 4, block=16, budget=112)
        add(f"topp-{roles}", roles, 50, 4, rule="topp", rule_value=0.6, budget=16)  # shares are not looked at
        add(f"correct-{roles}", roles, 60, 7, correct_every=3, correct="rerun")
    for roles in ("cross", "lonely", "window", "same-sparse", "share-cross", "share-random"):
        keep = dict(keep=0.5, observe=8, refresh=16)
        add(f"keep-{roles}", roles, 60, 4, **keep)
        add(f"keep-all-{roles}", roles, 60, 3, **{**keep, "keep": 1.0})
        add(f"keep-refresh-{roles}", roles, 60, 9, keep=0.4, observe=3, refresh=8)
        add(f"keep-ratio-{roles}", roles, 70, 4, rule="ratio", rule_value=0.5, budget=None, **keep)
        add(f"keep-edge-{roles}", roles, 22, 5, **keep)                     # observed before the first sparse step
        add(f"keep-first-{roles}", roles, 0, 28, **keep)                    # no prompt: observed when the first step would be sparse
        add(f"keep-block16-{roles}", roles, 254, 3, block=16, budget=112, **keep)
        add(f"keep-correct-{roles}", roles, 60, 7, correct_every=3, correct="rerun", **keep)
        add(f"keep-step-{roles}", roles, 60, 5, correct_every=3, **keep)
    add("keep-topp", "cross", 50, 3, rule="topp", rule_value=0.6, budget=16, keep=0.5)  # not looked at
    add("keep-retrieval", "all", 40, 3, keep=0.5)
    return out


def make_cases(folder):
    m, roles = Model(folder), write_roles(folder / "roles")
    rows, sets, cases = [], [], []
    for index, (name, role, n, steps, opt) in enumerate(case_list()):
        table = resolve(roles[role])
        share = [[int(x * 1024 + 0.5) for x in row] for row in roles[role]["budget_share"]] if "budget_share" in roles[role] else [[1024] * m.n_kv] * m.n_layer
        for attempt in range(500):                      # other ids until every cut is clear
            rng = np.random.default_rng([7, index, attempt])
            ids = rng.integers(3, m.cfg["vocab_size"], n + steps).tolist()
            out, logs = run_case(m, ids, n, table, share, opt, KV_ROUND["f32"])
            margin = min(log["margin"] for log in logs)
            if margin > 4e-4:
                break
        else:
            raise SystemExit(f"{name}: no ids with clear cuts")
        flat = []
        for log in logs:
            if log["dense"]:
                flat += [log["position"], -1, -1, 0]
            for l, h, tokens in log["sets"]:
                flat += [log["position"], l, h, len(tokens), *map(int, tokens)]
        cases.append({"name": name, "roles": role, "ids": ids, "decode_from": n, **opt,
                      "row": sum(map(len, rows)), "set_begin": len(sets), "set_end": len(sets) + len(flat),
                      "dense_steps": sum(log["dense"] for log in logs),
                      "head_tokens": sum(log["tokens"] for log in logs).ravel().tolist(),
                      "margin": None if math.isinf(margin) else round(float(margin), 7)})
        rows.append(out.astype("<f4"))
        sets += flat
    return cases, np.concatenate(rows), np.array(sets, "<i4")


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    args = ap.parse_args()
    cases, rows, sets = make_cases(FOLDER)
    out = FOLDER / "cases"
    if args.check:
        same = (json.loads((out / "cases.json").read_text()) == cases and np.array_equal(np.load(out / "sets.npy"), sets)
                and np.abs(np.load(out / "logits.npy") - rows).max() < 1e-6)
        print("equal" if same else "different")
        return 0 if same else 1
    out.mkdir(exist_ok=True)
    (out / "cases.json").write_text("[" + ",\n".join(json.dumps(c) for c in cases) + "]\n")
    np.save(out / "logits.npy", rows)
    np.save(out / "sets.npy", sets)
    print(f"{len(cases)} cases, {len(rows)} rows, {len(sets)} set integers, "
          f"smallest margin {min(c['margin'] or 1 for c in cases)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
