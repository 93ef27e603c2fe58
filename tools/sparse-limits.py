#!/usr/bin/env python3
"""Where hybrid decoding loses: the quality study's plain-text passages, decoded by a torch model of docs/SPARSE.md in variants that no engine can have.

    python3 tools/sparse-limits.py --longan build/longan MODEL.gguf ROLES.json TEXT... [--passages 16] [--ctx 4096] [--positions 128]

For a llama GGUF file and a donor map; needs torch and gguf; weights are expanded to f32, the cache is f32, --longan only makes the ids. Passages lie where
tools/quality.c puts them, so the row `map` repeats the study's donor row by an implementation of its own. The other rows:

    own set        every head that reads a set reads the one that its own scores pick: as many tokens, no donor can do better by these scores
    own mass       the same, by the attention mass itself, averaged over the group's query heads
    keep           heads keep a share of what they choose by their attention over the last 64 tokens before decoding (docs/SPARSE.md, "Kept tokens"), and
                   windows are sets too; every N: the last N tokens are then run again densely, and observed
    rerun N        after every N steps the last N are run again densely (--correct rerun --correct-every N)
    dense rows     keys and values of all decoded tokens, the newest too, are those of dense decoding: what is left is the loss of reading less
    mean of rest   what a head does not read stands in its softmax as one token: mean key, mean value, log of their number (with the true mass in its place)
"""
import argparse
import json
import math
import subprocess

import gguf
import numpy as np
import torch

LOW = -1e30


class Model:
    """Llama from GGUF: rotary pairs interleaved, as that format stores q and k."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        get = lambda key: reader.get_field(key).contents()
        if get("general.architecture") != "llama":
            raise SystemExit(f"{path}: not a llama model")
        self.w = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).astype(np.float32)) for t in reader.tensors}
        self.n_layer, self.n_head, self.n_kv = (int(get("llama." + k)) for k in ("block_count", "attention.head_count", "attention.head_count_kv"))
        self.dim = self.w["blk.0.attn_q.weight"].shape[0] // self.n_head
        self.group = self.n_head // self.n_kv
        self.eps = float(get("llama.attention.layer_norm_rms_epsilon"))
        self.inv = 1.0 / float(get("llama.rope.freq_base")) ** (torch.arange(0, self.dim, 2).float() / self.dim)
        self.scale = self.dim ** -0.5

    def norm(self, x, name):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.w[name]

    def rope(self, x, pos):
        angle = (pos[:, None].float() * self.inv)[:, None]
        even, odd, out = x[..., 0::2], x[..., 1::2], torch.empty_like(x)
        out[..., 0::2] = even * angle.cos() - odd * angle.sin()
        out[..., 1::2] = even * angle.sin() + odd * angle.cos()
        return out

    def forward(self, ids, start, cache, attend, want_logits=True):
        """Logits of ids at positions start..; cache: [(K, V)] of [n_kv, start, dim] a layer, not changed. attend(layer, q [n_kv, group, n, dim], K, V, pos)."""
        w, n, pos = self.w, len(ids), torch.arange(start, start + len(ids))
        x = w["token_embd.weight"][ids]
        for l in range(self.n_layer):
            h = self.norm(x, f"blk.{l}.attn_norm.weight")
            q, k, v = ((h @ w[f"blk.{l}.attn_{c}.weight"].T).view(n, -1, self.dim) for c in "qkv")
            k, v = self.rope(k, pos).transpose(0, 1), v.transpose(0, 1)
            if cache:
                k, v = torch.cat([cache[l][0], k], 1), torch.cat([cache[l][1], v], 1)
            q = self.rope(q, pos).view(n, self.n_kv, self.group, self.dim).permute(1, 2, 0, 3)
            x = x + attend(l, q, k, v, pos).permute(2, 0, 1, 3).reshape(n, -1) @ w[f"blk.{l}.attn_output.weight"].T
            h = self.norm(x, f"blk.{l}.ffn_norm.weight")
            x = x + (torch.nn.functional.silu(h @ w[f"blk.{l}.ffn_gate.weight"].T) * (h @ w[f"blk.{l}.ffn_up.weight"].T)) @ w[f"blk.{l}.ffn_down.weight"].T
        return self.norm(x, "output_norm.weight") @ w.get("output.weight", w["token_embd.weight"]).T if want_logits else None


class Dense:
    """Dense attention that keeps every layer's keys and values."""

    def __init__(self, model):
        self.m, self.rows = model, []

    def __call__(self, layer, q, K, V, pos):
        self.rows.append((K, V))
        if len(pos) == K.shape[1]:
            return torch.nn.functional.scaled_dot_product_attention(q, K[:, None].expand(-1, self.m.group, -1, -1), V[:, None].expand(-1, self.m.group, -1, -1), is_causal=True)
        later = torch.arange(K.shape[1]) > pos[:, None]
        return (q @ K[:, None].mT * self.m.scale).masked_fill(later, LOW).softmax(-1) @ V[:, None]


class Watch:
    """Dense attention that keeps the attention mass of every KV head, mean over its query heads and over the rows."""

    def __init__(self, model):
        self.m, self.mass = model, []

    def __call__(self, layer, q, K, V, pos):
        later = torch.arange(K.shape[1]) > pos[:, None]
        p = (q @ K[:, None].mT * self.m.scale).masked_fill(later, LOW).softmax(-1)
        self.mass.append(p.mean((1, 2)))
        return p @ V[:, None]


class Hybrid:
    """Attention by a donor map; variant: one of the names above, or None. keep: share of what a head chooses that it keeps by the masses `watched`."""

    def __init__(self, model, roles, variant=None, rows=None, keep=0, watched=None):
        self.m, self.map, self.variant, self.rows, self.keep, self.watched = model, roles, variant, rows, keep, watched
        self.share = roles.get("budget_share") or [[1] * model.n_kv] * model.n_layer
        self.scores = {}

    def budget(self, layer, head):
        least = self.map["sinks"] + self.map["recents"]
        return least + math.floor((self.map["budget"] - least) * self.share[layer][head])

    def window(self, pos, n, recents):
        t = torch.arange(n)
        return ((t < self.map["sinks"]) | (t > pos[:, None] - recents)) & (t <= pos[:, None])

    def kept(self, layer, head, budget, n):
        """The tokens the head keeps, of those that were neither sinks nor recent when it was watched."""
        mask, (sinks, recents) = torch.zeros(n, dtype=torch.bool), (self.map["sinks"], self.map["recents"])
        count = math.floor((budget - sinks - recents) * self.keep)
        if count > 0:
            mass = self.watched[layer][head]
            mask[sinks + mass[sinks:len(mass) - recents].topk(min(count, len(mass) - sinks - recents)).indices] = True
        return mask

    def chosen(self, score, pos, budget, kept=False):
        n = score.shape[1]
        score = score.masked_fill(self.window(pos, n, self.map["recents"]) | kept, -LOW).masked_fill(torch.arange(n) > pos[:, None], LOW)
        mask = torch.zeros_like(score, dtype=torch.bool)
        return mask.scatter_(1, score.topk(min(budget, n), 1).indices, True) & (torch.arange(n) <= pos[:, None])

    def __call__(self, layer, q, K, V, pos):
        if self.rows:
            K, V = self.rows[layer]
        n = K.shape[1]
        a = (q @ K[:, None].mT * self.m.scale).masked_fill(torch.arange(n) > pos[:, None], LOW)
        score = q.mean(1) @ K.mT
        out = torch.empty_like(q)
        for h in range(self.m.n_kv):
            role, budget = self.map["roles"][layer][h], self.budget(layer, h)
            if role == "retrieval":
                self.scores[layer, h] = score[h]
                out[h] = a[h].softmax(-1) @ V[h]
                continue
            if self.variant == "own set":
                mask = self.chosen(score[h], pos, budget)
            elif self.variant == "own mass":
                mask = self.chosen(a[h].softmax(-1).mean(0), pos, budget)
            elif role == "window" and not (self.keep and self.variant == "windows too"):
                mask = self.window(pos, n, budget - self.map["sinks"])
            else:
                score_of = torch.arange(n).float().expand(len(pos), n) if role == "window" else self.scores[tuple(role)]
                mask = self.chosen(score_of, pos, budget, self.kept(layer, h, budget, n))
            read = a[h].masked_fill(~mask, LOW)
            out[h] = read.softmax(-1) @ V[h]
            if self.variant and self.variant.startswith("mean of rest"):
                rest = ~mask & (torch.arange(n) <= pos[:, None])
                count = rest.sum(-1, keepdim=True).clamp(min=1)
                key, value = rest.float() @ K[h] / count, rest.float() @ V[h] / count
                if self.variant.endswith("true mass"):
                    mass = a[h].masked_fill(~rest, LOW).logsumexp(-1)
                else:
                    mass = (q[h] * key).sum(-1) * self.m.scale + count[:, 0].log()
                part = torch.sigmoid(mass - read.logsumexp(-1))[..., None]
                out[h] = (1 - part) * out[h] + part * value
        return out


def compare(dense, sparse):
    p, q = dense.log_softmax(-1), sparse.log_softmax(-1)
    return torch.stack([(p.exp() * (p - q)).sum(-1), (dense.argmax(-1) == sparse.argmax(-1)).float()])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model")
    ap.add_argument("roles")
    ap.add_argument("texts", nargs="+")
    ap.add_argument("--longan", required=True)
    ap.add_argument("--passages", type=int, default=16)
    ap.add_argument("--ctx", type=int, default=4096)
    ap.add_argument("--positions", type=int, default=128)
    ap.add_argument("--threads", type=int, default=0)
    ap.add_argument("--only", default="", help="rows whose names begin so, by commas")
    a = ap.parse_args()
    torch.set_grad_enabled(False)
    if a.threads:
        torch.set_num_threads(a.threads)
    model, roles = Model(a.model), json.load(open(a.roles, encoding="utf-8"))
    ids = [json.loads(subprocess.run([a.longan, "tokenize", "-m", a.model, "-f", f, "--json"], check=True, capture_output=True).stdout)["ids"] for f in sorted(a.texts)]
    rounds, size, n, total = -(-a.passages // len(ids)), a.ctx + a.positions + 1, a.positions, {}
    for i in range(a.passages):
        text, turn = ids[i % len(ids)], i // len(ids)
        at = (len(text) - size) // (rounds - 1) * turn if rounds > 1 else (len(text) - size) // 2
        x = torch.tensor(text[at:at + size])
        before, after = Dense(model), Dense(model)
        model.forward(x[:a.ctx], 0, None, before, want_logits=False)
        want = model.forward(x[a.ctx:a.ctx + n], a.ctx, before.rows, after)

        def watch(start, w):
            seen = Watch(model)
            model.forward(x[start - w:start], start - w, [(K[:, :start - w], V[:, :start - w]) for K, V in after.rows], seen, want_logits=False)
            return seen.mass

        def row(name, variant=None, every=n, rows=None, keep=0, last=0, age=0):
            if a.only and not name.startswith(tuple(a.only.split(","))):
                return
            for b in range(0, n, every):
                start = a.ctx + b
                cache = [(K[:, :start], V[:, :start]) for K, V in after.rows]
                got = model.forward(x[start:start + every], start, cache, Hybrid(model, roles, variant, rows, keep, watch(start - age, last) if last else None))
                total.setdefault(name, []).append(compare(want[b:b + every], got))

        row("map")
        for again in (n, 64, 32):
            row(f"keep 1/2, every {again}", "windows too", every=again, keep=0.5, last=64)
        for age in (512, 1536):
            row(f"keep 1/2, seen {age} tokens before", "windows too", keep=0.5, last=64, age=age)
        row("keep 1/2, the last 16", "windows too", keep=0.5, last=16)
        for keep in (0.25, 0.75):
            row(f"keep {keep}", "windows too", keep=keep, last=64)
        row("own set", "own set")
        row("own mass", "own mass")
        for every in (32, 16, 8):
            row(f"rerun {every}", every=every)
        row("dense rows", rows=after.rows)
        for name in ("mean of rest", "mean of rest, true mass"):
            row(name, name)
        print(f"{i + 1} passages, KL / top-1 %: " + "; ".join(f"{k} {m[0]:.4f} / {100 * m[1]:.1f}" for k, v in total.items() for m in [torch.cat(v, 1).mean(1)]), flush=True)


if __name__ == "__main__":
    main()
