#!/usr/bin/env python3
"""Writes the seeds of the libFuzzer targets, tests/fuzz/corpus: python3 tools/make-fuzz-corpus.py [longan]

Small valid files built from the formats' descriptions with the standard library alone; the snapshot comes from the program
(default build/longan), since it names the fingerprint of tests/fixtures/tiny-llama-linear. Files that fuzzers found are kept
beside them and left alone."""
import json, os, random, struct, subprocess, sys

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
CORPUS = os.path.join(ROOT, "tests/fuzz/corpus")
U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
PACK = {U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<B", U64: "<Q", I64: "<q", F64: "<d"}


def put(target, name, data):
    folder = os.path.join(CORPUS, target)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, name), "wb") as f:
        f.write(data if isinstance(data, bytes) else data.encode())


def string(s):
    b = s if isinstance(s, bytes) else s.encode()
    return struct.pack("<Q", len(b)) + b


def value(kind, v):
    if kind == STR:
        return string(v)
    if kind == ARR:
        elem, items = v
        return struct.pack("<IQ", elem, len(items)) + b"".join(value(elem, i) for i in items)
    return struct.pack(PACK[kind], v)


def gguf(version, meta, tensors):
    """tensors: (name, dims innermost first, ggml type, bytes)"""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(meta))
    for key, kind, v in meta:
        head += string(key) + struct.pack("<I", kind) + value(kind, v)
    data = b""
    for name, dims, kind, raw in tensors:
        data += b"\0" * (-len(data) % 32)
        head += string(name) + struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", d) for d in dims) + struct.pack("<IQ", kind, len(data))
        data += raw
    return head + b"\0" * (-len(head) % 32) + data


def model(arch):
    rng = random.Random(7)
    d, heads, kv, dim, ff, vocab = 8, 2, 1, 4, 8, ["a", "b", "c", "Ġ", "ab", "Ġa", "<|e|>"]
    def f32(*dims):
        n = 1
        for x in dims:
            n *= x
        return list(dims), 0, struct.pack("<%df" % n, *(rng.uniform(-1, 1) for _ in range(n)))
    meta = [("general.architecture", STR, arch), ("general.name", STR, "seed"), (arch + ".block_count", U32, 1), (arch + ".context_length", U32, 64),
            (arch + ".embedding_length", U32, d), (arch + ".feed_forward_length", U32, ff), (arch + ".attention.head_count", U32, heads),
            (arch + ".attention.head_count_kv", U32, kv), (arch + ".attention.key_length", U32, dim), (arch + ".attention.value_length", U32, dim),
            (arch + ".attention.layer_norm_rms_epsilon", F32, 1e-5), (arch + ".rope.freq_base", F32, 10000.0), ("tokenizer.ggml.model", STR, "gpt2"),
            ("tokenizer.ggml.pre", STR, "qwen2" if arch != "llama" else "llama-bpe"), ("tokenizer.ggml.tokens", ARR, (STR, vocab)),
            ("tokenizer.ggml.token_type", ARR, (I32, [1] * 6 + [3])), ("tokenizer.ggml.merges", ARR, (STR, ["a b", "Ġ a"])),
            ("tokenizer.ggml.eos_token_id", U32, 6), ("tokenizer.ggml.bos_token_id", U32, 6), ("tokenizer.ggml.add_bos_token", BOOL, 0)]
    t = [("token_embd.weight", *f32(d, len(vocab))), ("output_norm.weight", *f32(d)), ("blk.0.attn_norm.weight", *f32(d)), ("blk.0.ffn_norm.weight", *f32(d)),
         ("blk.0.attn_q.weight", *f32(d, heads * dim)), ("blk.0.attn_k.weight", *f32(d, kv * dim)), ("blk.0.attn_v.weight", *f32(d, kv * dim)),
         ("blk.0.attn_output.weight", *f32(heads * dim, d)), ("blk.0.ffn_gate.weight", *f32(d, ff)), ("blk.0.ffn_up.weight", *f32(d, ff)),
         ("blk.0.ffn_down.weight", *f32(ff, d))]
    if arch == "qwen2":
        t += [("blk.0.attn_q.bias", *f32(heads * dim)), ("blk.0.attn_k.bias", *f32(kv * dim)), ("blk.0.attn_v.bias", *f32(kv * dim))]
    if arch == "qwen3":
        t += [("blk.0.attn_q_norm.weight", *f32(dim)), ("blk.0.attn_k_norm.weight", *f32(dim))]
    return meta, t


for i, arch in enumerate(("llama", "qwen2", "qwen3")):
    put("gguf", arch + ".gguf", gguf(2 + i % 2, *model(arch)))
kinds = [("k%d" % k, k, 1.5 if k in (F32, F64) else 1) for k in PACK] + [("s", STR, "text"), ("e", ARR, (STR, []))]
kinds += [("a%d" % k, ARR, (k, [0, 1])) for k in PACK]
put("gguf", "types.gguf", gguf(3, kinds, [("q8", [32, 2], 8, b"\1" * 68), ("q4k", [256], 12, b"\1" * 144), ("h", [2, 1, 2, 1], 1, b"\0" * 8)]))


def safetensors(entries, data, meta=None):
    h = {"__metadata__": meta} if meta else {}
    h.update(entries)
    b = json.dumps(h, separators=(",", ":")).encode()
    b += b" " * (-len(b) % 8)
    return struct.pack("<Q", len(b)) + b + data


put("safetensors", "two.safetensors", safetensors({"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
                                                   "b": {"dtype": "BF16", "shape": [], "data_offsets": [8, 10]}}, b"\0" * 10, {"longan": "{}", "format": "pt"}))
put("safetensors", "empty.safetensors", safetensors({}, b""))
put("json", "values.json", '{"a":[1,-2.5e3,true,false,null,"x\\u0000\\ud83d\\ude00\\n"],"b":{"c":{},"d":[]},"":9223372036854775807}')
put("json", "deep.json", "[" * 128 + "]" * 128)
put("json", "text.json", '"\\"\\\\/\\b\\f\\t\\r\u00e9"')

letters = {c: i for i, c in enumerate("abcĠ")}
letters.update({"ab": 4, "Ġa": 5})
special = {"id": 6, "content": "<|e|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
flag = dict(special, id=7, content="<flag>", lstrip=True, normalized=True, special=False)
split = {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}| ?\\p{L}+|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated", "invert": False}
level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|e|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
            "special_tokens": {"<|e|>": {"id": "<|e|>", "ids": [6], "tokens": ["<|e|>"]}}}
bpe = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True, "vocab": letters}
put("tokenizer", "split.json", json.dumps({"version": "1.0", "added_tokens": [special, flag], "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": template, "decoder": {"type": "ByteLevel"},
    "model": dict(bpe, merges=[["a", "b"], ["Ġ", "a"]])}, separators=(",", ":"), ensure_ascii=False))
put("tokenizer", "plain.json", json.dumps({"added_tokens": [special], "normalizer": None,
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, dict(level, use_regex=True)]}, "post_processor": None,
    "decoder": {"type": "ByteLevel"}, "model": dict(bpe, merges=["a b", "Ġ a"], ignore_merges=False)}, separators=(",", ":"), ensure_ascii=False))

family = "0123456789abcdef0123456789abcdef"
put("roles", "donor.json", json.dumps({"format": "longan-roles", "version": 1, "model": {"family": family, "n_layer": 3, "n_head_kv": 2}, "share": "donor",
    "roles": [["retrieval", "window"], [[0, 0], "retrieval"], [[1, 1], "window"]], "n_retrieval": 2, "budget": 64, "sinks": 4, "recents": 8,
    "coverage": [[1, 0.5], [0.5, 1], [0.25, 0.5]]}, separators=(",", ":")))
put("roles", "same.json", json.dumps({"format": "longan-roles", "version": 1, "model": {"family": family, "n_layer": 2, "n_head_kv": 2}, "share": "same-index",
    "roles": [["retrieval", "retrieval"], ["sparse", "window"]]}, separators=(",", ":")))

longan = sys.argv[1] if len(sys.argv) > 1 else os.path.join(ROOT, "build/longan")
os.makedirs(os.path.join(CORPUS, "snapshot"), exist_ok=True)
target = os.path.join(CORPUS, "snapshot", "three.snap")
if os.path.exists(target):
    os.remove(target)
subprocess.run([longan, "generate", "-m", os.path.join(ROOT, "tests/fixtures/tiny-llama-linear"), "--ids", "-", "-n", "1", "--ctx", "64", "--threads", "1",
                "--session", target], input=b"1 2 3", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
