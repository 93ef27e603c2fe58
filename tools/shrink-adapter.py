#!/usr/bin/env python3
"""Memory weights in a smaller file: full memory matrices become low-rank additions to the base's.

    python3 tools/shrink-adapter.py ADAPTER.safetensors BASE.gguf OUT.safetensors [--bytes 16000000] [--family HEX]

Of each memory projection W_m the difference to the base's own W (dequantised, rows in half order) is kept as B A (compressor.* tensors).
The ranks share one budget: singular values of D diag(norm), the difference as inputs of the layer's norm weight see it, are taken
greatest first by what they add for a byte. The last layer's q is not used in compression and gets rank 1. Everything else stays.
--family: of the base, as `longan info` prints it; recorded, so that another base is refused.
Needs numpy and gguf."""
import argparse
import json
import struct

import numpy as np
from gguf import GGUFReader, dequantize

NAMES = {"q": "attn_q", "k": "attn_k", "v": "attn_v"}


def bf16(x):
    u = np.ascontiguousarray(x, "<f4").view("<u4")
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype("<u2")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("adapter")
    p.add_argument("base")
    p.add_argument("out")
    p.add_argument("--bytes", type=int, default=16_000_000)
    p.add_argument("--family")
    o = p.parse_args()

    raw = open(o.adapter, "rb").read()
    size = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8:8 + size])
    meta = json.loads(head.pop("__metadata__")["longan"])
    data = raw[8 + size:]
    reader = GGUFReader(o.base)
    base = {t.name: t for t in reader.tensors}
    n_head = int(reader.fields["llama.attention.head_count"].contents())
    n_kv = int(reader.fields["llama.attention.head_count_kv"].contents())

    def full(name):
        e = head[name]
        a, b = e["data_offsets"]
        if e["dtype"] != "BF16":
            raise SystemExit(f"{name}: dtype {e['dtype']}, only BF16 is read")
        return (np.frombuffer(data[a:b], "<u2").astype("<u4") << 16).view("<f4").reshape(e["shape"])

    def weight(name):
        t = base[name]
        return dequantize(t.data, t.tensor_type).reshape([int(n) for n in t.shape[::-1]])

    keep, work = {}, []
    layers = sum(k.endswith("lychee_memory_q_proj.weight") for k in head)
    for name, e in head.items():
        if "lychee_memory_" in name and name.endswith("_proj.weight"):
            layer, letter = int(name.split(".")[2]), name.split("lychee_memory_")[1][0]
            w = weight(f"blk.{layer}.{NAMES[letter]}.weight")
            if letter != "v":  # llama GGUF: rows of a head interleaved; adapters: halves
                heads = n_head if letter == "q" else n_kv
                w = w.reshape(heads, -1, 2, w.shape[1]).transpose(0, 2, 1, 3).reshape(w.shape)
            norm = np.maximum(np.abs(weight(f"blk.{layer}.attn_norm.weight").reshape(-1)), 1e-3)
            u, s, vt = np.linalg.svd((full(name) - w) * norm, full_matrices=False)
            work.append((layer, letter, u, s, vt / norm, 1 if letter == "q" and layer == layers - 1 else len(s)))
        else:
            keep[name] = (e["shape"], data[e["data_offsets"][0]:e["data_offsets"][1]])

    room = o.bytes - sum(len(b) for _, b in keep.values()) - 100_000  # the header
    gain = sorted(((s[i] ** 2 / (u.shape[0] + vt.shape[1]), i, j) for j, (_, _, u, s, vt, top) in enumerate(work) for i in range(top)), reverse=True)
    rank = [1] * len(work)
    room -= sum(2 * (u.shape[0] + vt.shape[1]) for _, _, u, _, vt, _ in work)
    for _, i, j in gain:
        cost = 2 * (work[j][2].shape[0] + work[j][4].shape[1])
        if i and room >= cost and rank[j] == i:
            rank[j] += 1
            room -= cost
    for (layer, letter, u, s, vt, _), r in zip(work, rank):
        root = np.sqrt(s[:r])
        stem = f"compressor.model.layers.{layer}.self_attn.{letter}_proj"
        a, b = vt[:r] * root[:, None], u[:, :r] * root * (r / meta["lora_alpha"])  # the loader multiplies by alpha / rank
        keep[stem + ".lora_A.weight"] = (a.shape, bf16(a).tobytes())
        keep[stem + ".lora_B.weight"] = (b.shape, bf16(b).tobytes())

    meta["made"] = "tools/shrink-adapter.py: memory projections as low-rank additions to the base's"
    if o.family:
        meta["family"] = o.family
    out, at = {"__metadata__": {"longan": json.dumps(meta)}}, 0
    for name, (shape, b) in keep.items():
        out[name] = {"dtype": "BF16", "shape": [int(n) for n in shape], "data_offsets": [at, at + len(b)]}
        at += len(b)
    text = json.dumps(out).encode()
    text += b" " * (-len(text) % 8)
    with open(o.out, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, b in keep.values():
            f.write(b)
    kept = 1 - sum((s[r:] ** 2).sum() for (_, _, _, s, _, _), r in zip(work, rank)) / sum((s ** 2).sum() for _, _, _, s, _, _ in work)
    print(f"{o.out}: {8 + len(text) + at} bytes, ranks {min(rank)} to {max(rank)}, mean {np.mean(rank):.1f}, {100 * kept:.1f}% of the difference's energy")


main()
