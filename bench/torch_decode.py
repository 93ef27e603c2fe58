#!/usr/bin/env python3
"""The peer: the strongest plain PyTorch decode and prefill of a model shape with random bf16 weights. JSON lines on stdout.

    python3 bench/torch_decode.py [--shape llama3-8b|smollm2-135m] [--cases 1x8k,1x32k,1x128k,8x32k] [--steps 30]
                                  [--prefill 32k] [--attention 4k,32k] [--no-ceilings]

A decode step is captured in a CUDA graph: fused QKV and gate-up products, RMS norm, rotary embedding, K and V written into a cache
of the full length, scaled_dot_product_attention over it, greedy pick. Each case runs with every SDPA back end that takes it (cuDNN,
flash), with grouped heads as they are (enable_gqa) and with the heads of a group laid out as rows of one query (packed: K and V are read
once a KV head); `best` marks the fastest. bytes = weights + K and V of the context, each once; the embedding table is not read.
Prefill runs whole layers over all tokens, the MLP in slices of 8192 rows.
ceilings: a device-to-device copy of 4 GiB (bytes read plus bytes written) and an 8192^3 bf16 product on random data.
bench/vs_torch.py imports this file and sets Longan beside it."""
import argparse
import json
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = {  # hidden, layers, heads, KV heads, head size, MLP, vocabulary, tied output
    "llama3-8b": (4096, 32, 32, 8, 128, 14336, 128256, False),
    "smollm2-135m": (576, 30, 9, 3, 64, 1536, 49152, True),
}
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
BF16 = torch.bfloat16


def size(text):
    text = text.strip().lower()
    unit = {"k": 1024, "m": 1024 ** 2}.get(text[-1], 1)
    return int(text[:-1] if unit > 1 else text) * unit


def event():
    return torch.cuda.Event(enable_timing=True)


def timed(call, reps, warm=3):
    """Median, least and greatest milliseconds of a call."""
    for _ in range(warm):
        call()
    times = []
    for _ in range(reps):
        a, b = event(), event()
        a.record()
        call()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b))
    times.sort()
    return times[len(times) // 2], times[0], times[-1]


def ceilings():
    """Copy bandwidth (B/s, reads and writes counted) and bf16 product rate (FLOP/s) of this card, now."""
    src = torch.empty(2 ** 32, dtype=torch.uint8, device="cuda").random_()
    dst = torch.empty_like(src)
    copy_ms = timed(lambda: dst.copy_(src), 15)[0]
    del src, dst
    a = torch.randn(8192, 8192, device="cuda", dtype=BF16)
    b = torch.randn(8192, 8192, device="cuda", dtype=BF16)
    mm_ms = timed(lambda: torch.mm(a, b), 25)[0]
    del a, b
    torch.cuda.empty_cache()
    return 2 * 2 ** 32 / copy_ms * 1e3, 2 * 8192 ** 3 / mm_ms * 1e3


class Peer:
    """Random weights of one shape on the device."""

    def __init__(self, shape):
        torch.manual_seed(1)
        self.shape = shape
        self.d, self.layers, self.nh, self.nkv, self.hd, self.ff, self.vocab, tied = SHAPES[shape]

        def weight(rows, cols):
            return torch.randn(rows, cols, device="cuda", dtype=BF16).mul_(0.02)

        ones = lambda: torch.ones(self.d, device="cuda", dtype=BF16)
        self.w = []
        for _ in range(self.layers):
            self.w.append({"qkv": weight((self.nh + 2 * self.nkv) * self.hd, self.d), "o": weight(self.d, self.nh * self.hd),
                           "gu": weight(2 * self.ff, self.d), "down": weight(self.d, self.ff), "n1": ones(), "n2": ones()})
        self.embed = weight(self.vocab, self.d)
        self.head = self.embed if tied else weight(self.vocab, self.d)
        self.norm = ones()
        self.weight_bytes = 2 * (sum(t.numel() for w in self.w for t in w.values()) + self.head.numel() + self.d)

    def close(self):
        self.w, self.embed, self.head = [], None, None
        torch.cuda.empty_cache()

    def rms(self, x, gain):
        return F.rms_norm(x, (self.d,), gain, 1e-5)

    @staticmethod
    def rope(x, cos, sin):
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    def mlp(self, x, w):
        g = self.rms(x, w["n2"]) @ w["gu"].T
        return (F.silu(g[..., :self.ff]) * g[..., self.ff:]) @ w["down"].T

    def step(self, ids, cache, cos, sin, packed):
        batch, group = ids.shape[0], self.nh // self.nkv
        x = self.embed[ids]
        for w, (k, v) in zip(self.w, cache):
            h = (self.rms(x, w["n1"]) @ w["qkv"].T).view(batch, self.nh + 2 * self.nkv, self.hd)
            qk = self.rope(h[:, :self.nh + self.nkv], cos, sin)
            k[:, :, -1] = qk[:, self.nh:]
            v[:, :, -1] = h[:, self.nh + self.nkv:]
            q = qk[:, :self.nh]
            if packed:
                a = F.scaled_dot_product_attention(q.reshape(batch, self.nkv, group, self.hd), k, v)
            else:
                a = F.scaled_dot_product_attention(q.reshape(batch, self.nh, 1, self.hd), k, v, enable_gqa=True)
            x = x + a.reshape(batch, self.nh * self.hd) @ w["o"].T
            x = x + self.mlp(x, w)
        return (self.rms(x, self.norm) @ self.head.T).argmax(-1)

    def decode_with(self, batch, context, backend, packed, steps):
        shape = (batch, self.nkv, context, self.hd)
        cache = [(torch.randn(shape, device="cuda", dtype=BF16), torch.randn(shape, device="cuda", dtype=BF16)) for _ in range(self.layers)]
        ids = torch.randint(0, self.vocab, (batch,), device="cuda")
        cos, sin = torch.randn(2, self.hd, device="cuda", dtype=BF16).clamp_(-1, 1)
        with torch.no_grad(), sdpa_kernel(BACKENDS[backend]):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.step(ids, cache, cos, sin, packed)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step(ids, cache, cos, sin, packed)
            ms, least, most = timed(graph.replay, steps)
        del graph, cache
        torch.cuda.empty_cache()
        return ms, least, most

    def decode(self, batch, context, steps=30, copy=None, only=None):
        """One result a variant (only: the one of that name), the fastest marked."""
        kv = 2 * 2 * batch * self.nkv * context * self.hd * self.layers
        results = []
        for backend in BACKENDS:
            for packed in (False, True):
                if only not in (None, backend + (" packed" if packed else "")):
                    continue
                r = {"peer": "torch " + torch.__version__, "what": "decode", "shape": self.shape, "batch": batch, "context": context,
                     "sdpa": backend + (" packed" if packed else ""), "bytes": self.weight_bytes + kv}
                try:
                    r["ms"], r["ms_min"], r["ms_max"] = self.decode_with(batch, context, backend, packed, steps)
                    r["bytes_per_s"] = r["bytes"] / r["ms"] * 1e3
                    r["share_of_copy"] = r["bytes_per_s"] / copy if copy else None
                except Exception as e:  # a back end that refuses the case is a result, not an end
                    r["error"] = str(e).splitlines()[0][:160] if str(e) else type(e).__name__
                    torch.cuda.empty_cache()
                results.append(r)
        done = [r for r in results if "ms" in r]
        if done:
            min(done, key=lambda r: r["ms"])["best"] = True
        return results

    def prefill(self, tokens, reps=2):
        """Seconds for all layers over `tokens` tokens (causal) and the last token's logits; per back end."""
        flop = 2.0 * tokens * sum(w[n].numel() for w in self.w for n in ("qkv", "o", "gu", "down"))
        attention = 4.0 * self.hd * self.nh * self.layers * tokens * (tokens + 1) / 2
        ids = torch.randint(0, self.vocab, (tokens,), device="cuda")
        angle = torch.rand(tokens, 1, self.hd, device="cuda") * 6.28
        cos, sin = angle.cos().to(BF16), angle.sin().to(BF16)
        results = []
        for backend in BACKENDS:
            def run():
                x = self.embed[ids]
                for w in self.w:
                    h = (self.rms(x, w["n1"]) @ w["qkv"].T).view(tokens, self.nh + 2 * self.nkv, self.hd)
                    qk = self.rope(h[:, :self.nh + self.nkv], cos, sin).transpose(0, 1)[None]
                    v = h[:, self.nh + self.nkv:].transpose(0, 1)[None]
                    a = F.scaled_dot_product_attention(qk[:, :self.nh], qk[:, self.nh:], v, is_causal=True, enable_gqa=True)
                    x = x + a[0].transpose(0, 1).reshape(tokens, self.nh * self.hd) @ w["o"].T
                    for at in range(0, tokens, 8192):
                        x[at:at + 8192] += self.mlp(x[at:at + 8192], w)
                return (self.rms(x[-1:], self.norm) @ self.head.T).argmax(-1)
            r = {"peer": "torch " + torch.__version__, "what": "prefill", "shape": self.shape, "tokens": tokens, "sdpa": backend}
            try:
                with torch.no_grad(), sdpa_kernel(BACKENDS[backend]):
                    ms = timed(run, reps, warm=1)[0]
                r.update(s=ms / 1e3, tok_s=tokens / ms * 1e3, flop=flop + attention, flop_per_s=(flop + attention) / ms * 1e3)
            except Exception as e:
                r["error"] = str(e).splitlines()[0][:160] if str(e) else type(e).__name__
            torch.cuda.empty_cache()
            results.append(r)
        done = [r for r in results if "s" in r]
        if done:
            min(done, key=lambda r: r["s"])["best"] = True
        return results

    def attention(self, tokens, reps=5):
        """Causal attention alone, one layer."""
        q = torch.randn(1, self.nh, tokens, self.hd, device="cuda", dtype=BF16)
        k = torch.randn(1, self.nkv, tokens, self.hd, device="cuda", dtype=BF16)
        v = torch.randn_like(k)
        flop = 4.0 * self.hd * self.nh * tokens * (tokens + 1) / 2
        results = []
        for backend in BACKENDS:
            r = {"peer": "torch " + torch.__version__, "what": "attention", "shape": self.shape, "tokens": tokens, "sdpa": backend}
            try:
                with torch.no_grad(), sdpa_kernel(BACKENDS[backend]):
                    r["ms"] = timed(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), reps)[0]
                r["flop_per_s"] = flop / r["ms"] * 1e3
            except Exception as e:
                r["error"] = str(e).splitlines()[0][:160] if str(e) else type(e).__name__
            results.append(r)
        return results


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=SHAPES, default="llama3-8b")
    p.add_argument("--cases", default="1x8k,1x32k,1x128k,8x32k", help="batch x context, comma-separated; empty: none")
    p.add_argument("--steps", type=int, default=30)
    p.add_argument("--prefill", default="", help="tokens, comma-separated")
    p.add_argument("--attention", default="4k,32k", help="tokens, comma-separated; empty: none")
    p.add_argument("--no-ceilings", action="store_true")
    o = p.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch_decode: PyTorch sees no CUDA device")
    say = lambda r: print(json.dumps(r), flush=True)
    copy = None
    if not o.no_ceilings:
        copy, product = ceilings()
        say({"what": "ceilings", "device": torch.cuda.get_device_name(), "copy_bytes_per_s": copy, "bf16_flop_per_s": product})
    peer = Peer(o.shape)
    for case in filter(None, o.cases.split(",")):
        batch, context = case.lower().split("x")
        for r in peer.decode(int(batch), size(context), o.steps, copy):
            say(r)
    for tokens in filter(None, o.attention.split(",")):
        for r in peer.attention(size(tokens)):
            say(r)
    for tokens in filter(None, o.prefill.split(",")):
        for r in peer.prefill(size(tokens)):
            say(r)


if __name__ == "__main__":
    main()
