#!/usr/bin/env python3
"""Clean-room reference of compressed memory (LycheeMemory), written from sections 1 and 2 of the specification alone.

numpy, float64 sums over float32 weights, no batching, rows kept interleaved as the text has them: everything the engine
does differently (rows re-ordered, many chunks in one pass, a paged cache) is compared with this. Angles are float32, as the
specification has them.

    model = Model(FOLDER)                          config.json, model.safetensors or shards; lychee_memory_* or beacon_* names
    k, v = model.compress(ids, chunk)              [n_layer, slots, n_head_kv, head_dim], K not rotated
    logits = model.read(k, v, base, prompt)        all positions; slot_rope=True rotates slot i at i
    ids, margins = model.greedy(k, v, base, prompt, n, stop)
    steps, answer = model.loop(text, question, pieces, ...)
"""
import json
import math
import pathlib
import struct

import numpy as np


def read_safetensors(path):
    data = pathlib.Path(path).read_bytes()
    n, = struct.unpack("<Q", data[:8])
    head = json.loads(data[8:8 + n])
    out = {}
    for name, t in head.items():
        if name == "__metadata__":
            continue
        a, b = t["data_offsets"]
        raw = data[8 + n + a:8 + n + b]
        if t["dtype"] == "F32":
            v = np.frombuffer(raw, "<f4")
        elif t["dtype"] == "BF16":
            v = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            raise ValueError(f"{path}: {name}: {t['dtype']}")
        out[name] = v.reshape(t["shape"])
    return out


def rows_of_window(n_raw, ratio, base):
    """Rows of one window of n_raw raw tokens after `base` slots: (kind, raw index or None, position); kind 1 is memory."""
    rows, pos = [], base
    for g in range(0, n_raw, ratio):
        for i in range(g, min(g + ratio, n_raw)):
            rows.append((0, i, pos))
            pos += 1
        rows.append((1, None, pos))
        pos += 1
    return rows


class Model:
    def __init__(self, folder):
        folder = pathlib.Path(folder)
        c = json.loads((folder / "config.json").read_text())
        self.cfg = c
        self.n_layer, self.d = c["num_hidden_layers"], c["hidden_size"]
        self.heads, self.kv = c["num_attention_heads"], c["num_key_value_heads"]
        self.hd = c.get("head_dim") or self.d // self.heads
        self.eps, self.theta = c["rms_norm_eps"], c["rope_theta"]
        self.window = c["lychee_memory_window"]
        self.ratio = c["lychee_memory_ratio"][0]
        self.param = c["lychee_memory_param"]
        w = {}
        for f in sorted(folder.glob("*.safetensors")):
            w.update(read_safetensors(f))
        self.w = {}
        for name, v in w.items():
            self.w[name] = v.astype(np.float64)
            if "beacon_" in name:
                self.w.setdefault(name.replace("beacon_", "lychee_memory_"), v.astype(np.float64))
        i = np.arange(0, self.hd, 2, dtype=np.float32) / np.float32(self.hd)
        self.freq = (1.0 / np.power(np.float32(self.theta), i)).astype(np.float32)

    # -- pieces of a layer
    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w[name]

    def rotate(self, x, pos):
        """x [rows, heads, hd], half-split pairs (i, i + hd/2)."""
        angle = (np.asarray(pos, np.float32)[:, None] * self.freq).astype(np.float32).astype(np.float64)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :self.hd // 2], x[..., self.hd // 2:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def project(self, h, layer, letter, memory):
        """Raw rows by the base's projection, memory rows by their own where the model lists one."""
        at = f"model.layers.{layer}.self_attn."
        base = self.w[at + letter + "_proj.weight"], self.w.get(at + letter + "_proj.bias", 0.0)
        own = base
        if letter in self.param:
            own = (self.w[at + f"lychee_memory_{letter}_proj.weight"], self.w.get(at + f"lychee_memory_{letter}_proj.bias", 0.0))
        out = h @ base[0].T + base[1]
        if memory.any():
            out[memory] = h[memory] @ own[0].T + own[1]
        return out

    def forward(self, x, memory, pos, past_k, past_v):
        """Rows x [n, d] behind past rows; past_k is rotated already. Returns the last hidden rows and, per layer, the new
        rows' K (not rotated) and V."""
        n, new_k, new_v = len(x), [], []
        for l in range(self.n_layer):
            at = f"model.layers.{l}."
            h = self.norm(x, at + "input_layernorm.weight")
            q = self.project(h, l, "q", memory).reshape(n, self.heads, self.hd)
            k = self.project(h, l, "k", memory).reshape(n, self.kv, self.hd)
            v = self.project(h, l, "v", memory).reshape(n, self.kv, self.hd)
            new_k.append(k)
            new_v.append(v)
            q = self.rotate(q, pos)
            keys = np.concatenate([past_k[l], self.rotate(k, pos)])
            values = np.concatenate([past_v[l], v])
            n_past = len(past_k[l])
            group = self.heads // self.kv
            keys, values = np.repeat(keys, group, 1), np.repeat(values, group, 1)
            s = np.einsum("qhd,khd->hqk", q, keys) / math.sqrt(self.hd)
            s[:, np.arange(len(keys))[None] > np.arange(n)[:, None] + n_past] = -np.inf
            p = np.exp(s - s.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            o = np.einsum("hqk,khd->qhd", p, values).reshape(n, -1)
            x = x + self.project(o, l, "o", memory)
            h = self.norm(x, at + "post_attention_layernorm.weight")
            gate = h @ self.w[at + "mlp.gate_proj.weight"].T
            up = h @ self.w[at + "mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w[at + "mlp.down_proj.weight"].T
        return x, new_k, new_v

    def logits(self, x):
        return self.norm(x, "model.norm.weight") @ self.w["lm_head.weight"].T

    def none(self):
        return [np.zeros((0, self.kv, self.hd))] * self.n_layer

    # -- section 1
    def compress(self, ids, ratio=None, rows_out=None):
        ratio = ratio or self.ratio
        ids = np.asarray(ids)
        ks, vs = self.none(), self.none()
        for w in range(0, len(ids), self.window):
            part = ids[w:w + self.window]
            base = len(ks[0])
            rows = rows_of_window(len(part), ratio, base)
            memory = np.array([r[0] == 1 for r in rows])
            x = np.stack([self.w["model.lychee_memory_embed_tokens.weight"][0] if r[0] else
                          self.w["model.embed_tokens.weight"][part[r[1]]] for r in rows])
            past = [self.rotate(k, np.arange(base)) for k in ks]
            _, k, v = self.forward(x, memory, [r[2] for r in rows], past, vs)
            ks = [np.concatenate([a, b[memory]]) for a, b in zip(ks, k)]
            vs = [np.concatenate([a, b[memory]]) for a, b in zip(vs, v)]
            if rows_out is not None:
                rows_out += rows
        return np.stack(ks), np.stack(vs)

    # -- section 2
    def read(self, k, v, base, prompt, slot_rope=False):
        past_k = [self.rotate(x, np.arange(len(x))) if slot_rope else x for x in k]
        x = self.w["model.embed_tokens.weight"][np.asarray(prompt)]
        x, _, _ = self.forward(x, np.zeros(len(prompt), bool), base + np.arange(len(prompt)), past_k, v)
        return self.logits(x)

    def greedy(self, k, v, base, prompt, n, stop, slot_rope=False):
        """(ids without the stop id, gap between the two greatest logits at every step)."""
        ids, gaps = list(prompt), []
        out = []
        while len(out) < n:
            last = self.read(k, v, base, ids, slot_rope)[-1]
            order = np.argsort(-last, kind="stable")
            gaps.append(float(last[order[0]] - last[order[1]]))
            if order[0] in stop:
                break
            out.append(int(order[0]))
            ids.append(int(order[0]))
        return out, gaps

    def loop(self, text, question, update, final, init, chunk, memory_size, max_new, stop, pad, slot_rope=False):
        """update, final: the three literal pieces of each template, as ids. Returns the steps and the answer's."""
        m, steps = list(init), []
        for at in range(0, len(text), chunk):
            k, v = self.compress(text[at:at + chunk])
            prompt = update[0] + question + update[1] + m + update[2]
            ids, gaps = self.greedy(k, v, chunk // self.ratio, prompt, memory_size, stop, slot_rope)
            m = [i for i in ids if i != pad and i not in stop][-memory_size:]
            steps.append({"prompt_ids": prompt, "position0": chunk // self.ratio, "memory_ids": m, "gaps": gaps})
        prompt = final[0] + question + final[1] + m + final[2]
        ids, gaps = self.greedy(self.none(), self.none(), 0, prompt, max_new, stop)
        return steps, {"prompt_ids": prompt, "position0": 0, "answer_ids": ids, "gaps": gaps}


def kept(logits, temp, top_k, top_p):
    """Ids that stay after temperature, top-k and nucleus filtering, in that order."""
    x = np.asarray(logits, np.float64)
    if temp > 0 and temp != 1:
        x = x / temp
    alive = np.ones(len(x), bool)
    if top_k:
        alive = x >= np.sort(x)[-top_k]
    if 0 < top_p < 1:
        order = np.argsort(-np.where(alive, x, -np.inf), kind="stable")
        p = np.where(alive, np.exp(x - x.max()), 0)[order]
        p /= p.sum()
        before = np.cumsum(p) - p
        alive &= np.isin(np.arange(len(x)), order[before < top_p])
    return np.flatnonzero(alive).tolist()
