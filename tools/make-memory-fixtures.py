#!/usr/bin/env python3
"""Makes tests/fixtures/memory: a tiny random checkpoint in the official layout and what tools/memory_ref.py computes with it.

    python tools/make-memory-fixtures.py [--variants DIR]      needs numpy alone

tests/fixtures/memory/model   a complete Hugging Face folder (Qwen2 with lychee_memory_* tensors, f32, one file); the tests make
                              the other layouts from it. --variants DIR writes them too: shards, beacon, missing, bf16.
tests/fixtures/memory/ref     text.txt (600 ids), prompt.txt (40 ids)
  rows_N.npy   int32 [rows, 2]: kind (1: memory) and position of every row of compressing the first N ids
  k_N.npy, v_N.npy   float32 [n_layer * slots, n_head_kv * head_dim]: the slots, K not rotated
  read_N.npy   float32 [40, n_vocab]: logits of the prompt behind them; rope_N.npy: with slots rotated at their index
  plain_N.npy  float32 [N, n_vocab]: a prompt of the first N ids without slots
  greedy.json  16 greedy ids behind each bank and the gap of the two greatest logits at every step
  loop.json    the recurrent loop on all 600 ids: prompts, memories, answer;  sample.json   ids kept by the sampling filters
"""
import argparse
import json
import math
import pathlib
import struct
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import memory_ref  # noqa: E402

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests/fixtures/memory"
VOCAB, HIDDEN, HEADS, KV, HD, FF, LAYERS = 264, 64, 4, 2, 16, 160, 3
LENGTHS = [1, 3, 4, 5, 127, 128, 129, 131, 255, 256]
CHUNK, WINDOW = 256, 128
PAD, START, END = 256, 257, 258
MASK = (1 << 64) - 1
TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
UPDATE, FINAL = "\nA {prompt}\nB {memory}\nC:", "F {prompt}\nM {memory}\nA:"


def normal(name, n):
    """splitmix64 from the FNV-1a hash of the name -> uniform -> Box-Muller."""
    h = 0xcbf29ce484222325
    for b in name.encode():
        h = (h ^ b) * 0x100000001b3 & MASK
    with np.errstate(over="ignore"):
        z = np.uint64(h) + np.arange(1, 2 * ((n + 1) // 2) + 1, dtype=np.uint64) * np.uint64(0x9e3779b97f4a7c15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xbf58476d1ce4e5b9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94d049bb133111eb)
        z = z ^ (z >> np.uint64(31))
    u = ((z >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0 ** 53
    r, a = np.sqrt(-2 * np.log(u[0::2])), 2 * math.pi * u[1::2]
    return np.stack([r * np.cos(a), r * np.sin(a)], 1).ravel()[:n]


def tensors():
    t = {}

    def put(name, shape, std, mean=0.0):
        t[name] = (mean + std * normal(name, math.prod(shape))).reshape(shape).astype(np.float32)

    put("model.embed_tokens.weight", (VOCAB, HIDDEN), 1)
    put("model.lychee_memory_embed_tokens.weight", (1, HIDDEN), 1)
    for l in range(LAYERS):
        at = f"model.layers.{l}."
        put(at + "input_layernorm.weight", (HIDDEN,), 0.1, 1)
        put(at + "post_attention_layernorm.weight", (HIDDEN,), 0.1, 1)
        for head in ("", "lychee_memory_"):
            for letter, n in (("q", HEADS * HD), ("k", KV * HD), ("v", KV * HD)):
                put(at + f"self_attn.{head}{letter}_proj.weight", (n, HIDDEN), 0.15)
                put(at + f"self_attn.{head}{letter}_proj.bias", (n,), 0.3)
        put(at + "self_attn.o_proj.weight", (HIDDEN, HEADS * HD), 0.15)
        put(at + "mlp.gate_proj.weight", (FF, HIDDEN), 0.15)
        put(at + "mlp.up_proj.weight", (FF, HIDDEN), 0.15)
        put(at + "mlp.down_proj.weight", (HIDDEN, FF), 0.15)
    put("model.norm.weight", (HIDDEN,), 0.1, 1)
    put("lm_head.weight", (VOCAB, HIDDEN), 0.3)
    put("similarity_head.weight", (1, HIDDEN), 0.3)
    put("similarity_head.bias", (1,), 0.3)
    return t


def write_safetensors(path, t, bf16=False):
    head, data = {"__metadata__": {"format": "pt"}}, b""
    for name, v in t.items():
        u = v.view(np.uint32)
        raw = (((u.astype(np.uint64) + 0x7fff + ((u >> 16) & 1)) >> 16).astype("<u2") if bf16 else v.astype("<f4")).tobytes()
        head[name] = {"dtype": "BF16" if bf16 else "F32", "shape": list(v.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_rest(folder, dtype="float32"):
    folder.mkdir(parents=True, exist_ok=True)
    memory = {"window": WINDOW, "stride": WINDOW, "attn": "full-coverage", "ratio": [4], "ratio_mix": "adapt-1024", "param": ["q", "k", "v"],
              "embed_init": "eos", "sink_size": 0, "attend_prev": True, "pos": "interleave", "parallel_window": 1}
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_attention_heads": HEADS,
              "num_key_value_heads": KV, "intermediate_size": FF, "num_hidden_layers": LAYERS, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
              "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": dtype, "hidden_act": "silu", "bos_token_id": PAD,
              "eos_token_id": END, "use_sliding_window": False}
    config.update({f"lychee_memory_{k}": v for k, v in memory.items()})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    # bytes that print stand for themselves in byte-level vocabularies, the others are moved up from 256 on
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    char = {b: chr(b) for b in shown}
    char.update({b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in char)})
    special = {PAD: "<|endoftext|>", START: "<|im_start|>", END: "<|im_end|>"}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tok = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [{"id": i, "content": s, **flags} for i, s in special.items()],
           "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
           "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
           "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                     "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": {char[b]: b for b in range(256)}, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(tok, ensure_ascii=False, indent=1) + "\n")
    conf = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": {str(i): {"content": s, **flags} for i, s in special.items()}, "bos_token": None,
            "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "add_prefix_space": False, "model_max_length": 4096,
            "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(conf, ensure_ascii=False, indent=1) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": PAD, "eos_token_id": END}) + "\n")


def variants(where, t):
    for name in ("shards", "beacon", "missing", "bf16"):
        folder = where / name
        write_rest(folder, "bfloat16" if name == "bf16" else "float32")
        if name == "shards":
            names, index = list(t), {}
            for i, part in enumerate((names[:len(names) // 2], names[len(names) // 2:])):
                file = f"model-0000{i + 1}-of-00002.safetensors"
                write_safetensors(folder / file, {n: t[n] for n in part})
                index.update({n: file for n in part})
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1) + "\n")
        else:
            rename = {n: n.replace("lychee_memory_", "beacon_") if name == "beacon" else n for n in t if name != "missing" or "lychee_memory_" not in n}
            write_safetensors(folder / "model.safetensors", {new: t[old] for old, new in rename.items()}, name == "bf16")


def pieces(template):
    """The template as one user turn, split at the placeholders, each literal piece tokenised apart."""
    text = "<|im_start|>user\n" + template + "<|im_end|>\n<|im_start|>assistant\n"
    out = []
    for part in text.replace("{memory}", "{prompt}").split("{prompt}"):
        ids = []
        while part:
            for i, s in ((PAD, "<|endoftext|>"), (START, "<|im_start|>"), (END, "<|im_end|>")):
                if part.startswith(s):
                    ids.append(i)
                    part = part[len(s):]
                    break
            else:
                ids += part[0].encode()
                part = part[1:]
        out.append(ids)
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--variants", type=pathlib.Path, help="also write the other layouts there")
    a = ap.parse_args()
    t = tensors()
    write_rest(OUT / "model")
    write_safetensors(OUT / "model/model.safetensors", t)
    if a.variants:
        variants(a.variants, t)
    ref = OUT / "ref"
    ref.mkdir(parents=True, exist_ok=True)
    model = memory_ref.Model(OUT / "model")
    text = (np.floor(256 * (0.5 + 0.5 * np.tanh(normal("text", 600)))).astype(int) % 256).tolist()
    prompt = (np.abs(normal("prompt", 40) * 1000).astype(int) % 256).tolist()
    (ref / "text.txt").write_text(" ".join(map(str, text)) + "\n")
    (ref / "prompt.txt").write_text(" ".join(map(str, prompt)) + "\n")
    greedy = {}
    for n in LENGTHS:
        rows = []
        k, v = model.compress(text[:n], rows_out=rows)
        np.save(ref / f"rows_{n}.npy", np.array([[r[0], r[2]] for r in rows], np.int32))
        np.save(ref / f"k_{n}.npy", k.reshape(-1, KV * HD).astype(np.float32))
        np.save(ref / f"v_{n}.npy", v.reshape(-1, KV * HD).astype(np.float32))
        np.save(ref / f"read_{n}.npy", model.read(k, v, CHUNK // 4, prompt).astype(np.float32))
        ids, gaps = model.greedy(k, v, CHUNK // 4, prompt, 16, {END})
        greedy[n] = {"ids": ids, "gaps": gaps}
        if n in (129, 256):
            np.save(ref / f"rope_{n}.npy", model.read(k, v, CHUNK // 4, prompt, True).astype(np.float32))
    (ref / "greedy.json").write_text(json.dumps(greedy) + "\n")
    for n in (1, 40, 128):
        np.save(ref / f"plain_{n}.npy", model.read(model.none(), model.none(), 0, text[:n]).astype(np.float32))
    question = list(b"who?")
    steps, answer = model.loop(text, question, pieces(UPDATE), pieces(FINAL), list(b"No previous memory"), CHUNK, 16, 16, {END}, PAD)
    (ref / "loop.json").write_text(json.dumps({"update": UPDATE, "final": FINAL, "memory_init": "No previous memory", "question_ids": question,
                                               "chunk": CHUNK, "memory_size": 16, "max_new": 16, "stop_ids": [END], "pad_id": PAD,
                                               "steps": steps, "answer": answer}) + "\n")
    logits = np.load(ref / "plain_40.npy")[-1]
    cases = [(1.0, 0, 1.0), (1.0, 5, 1.0), (0.7, 50, 0.9), (1.5, 0, 0.5), (0.3, 20, 0.95), (1.0, 1, 0.5)]
    (ref / "sample.json").write_text(json.dumps([{"temp": x, "top_k": y, "top_p": z, "kept": memory_ref.kept(logits, x, y, z)} for x, y, z in cases]) + "\n")
    gaps = [g for s in steps for g in s["gaps"]] + answer["gaps"] + [g for s in greedy.values() for g in s["gaps"]]
    print(f"{sum(f.stat().st_size for f in OUT.rglob('*') if f.is_file())} bytes; smallest gap {min(gaps):.4f}; longest prompt "
          f"{max(len(s['prompt_ids']) for s in steps + [answer])}")


if __name__ == "__main__":
    main()
