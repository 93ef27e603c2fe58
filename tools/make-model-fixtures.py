#!/usr/bin/env python3
"""Makes the tiny random models of tests/fixtures and their reference outputs.

    python tools/make-model-fixtures.py [NAME ...]      needs torch, transformers 5, tokenizers, safetensors

Each folder is a complete Hugging Face model with a tokenizer trained here on seeded text. Under ref/:
  prompt.txt      200 ids of text (no BOS)
  logits.npy      float32 [200, n_vocab], transformers in f32 on the CPU
  greedy.txt      the 32 ids greedy decoding gives after the prompt; every step's top-2 gap exceeds 1e-3
  bf16.npy, q8_0.npy   float32 [25, n_vocab]: logits after ids 7, 15, 23 ... when all matrices are first
                  rounded to that dtype and expanded again (norms and biases stay f32)
  kv_f16.npy, kv_bf16.npy, kv_q8.npy   the same rows with K and V rounded to that cache dtype
  ref.json        deviations computed by tools/hybrid_ref.py: of transformers' f32 from float64, and what each
                  rounding of weights and cache does to the logits (the tests take their bounds from it)
  tokens.json     texts with their ids, plain and with special strings, and rendered chats
"""
import json
import pathlib
import random
import shutil
import sys

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import hybrid_ref  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "tests/fixtures"
VOCAB = 320

# The published pre-tokenizer patterns of the two families (facts of their tokenizer files).
SPLIT_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPLIT_QWEN = SPLIT_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

CHATML = ("{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
          "{{ '<|im_start|>system\nYou are a tiny fixture that answers in a word.<|im_end|>\n' }}{% endif %}"
          "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN_DEFAULT = ("{%- if messages[0]['role'] != 'system' %}"
                "{{- '<|im_start|>system\nYou are Fixture, made for tests. You are terse.<|im_end|>\n' }}{%- endif %}"
                "{%- for message in messages %}"
                "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endfor %}"
                "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")
QWEN_PLAIN = ("{%- for message in messages %}"
              "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endfor %}"
              "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")
LLAMA3 = ("{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
          "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
          " + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")

FAMILIES = {
    "llama3": dict(template=LLAMA3, special=["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                                             "<|end_header_id|>", "<|eot_id|>"],
                   bos="<|begin_of_text|>", eos="<|eot_id|>", pad=None, stop=["<|end_of_text|>", "<|eot_id|>"]),
    "qwen": dict(template=QWEN_DEFAULT, special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                 bos=None, eos="<|im_end|>", pad="<|endoftext|>", stop=["<|im_end|>", "<|endoftext|>"]),
    "smollm": dict(template=CHATML, special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                   bos="<|im_start|>", eos="<|im_end|>", pad="<|im_end|>", stop=["<|im_end|>"]),
}


def seeded_text(seed, n_word):
    """Words from a small stock of syllables, with digits, punctuation, line ends and other scripts between."""
    rng = random.Random(seed)
    onset, vowel, coda = "b d f g k l m n p r s t v z th sh".split(), "a e i o u ai ou".split(), ["", "n", "r", "s", "l"]
    stock = ["".join(rng.choice(onset) + rng.choice(vowel) + rng.choice(coda) for _ in range(rng.randint(1, 3)))
             for _ in range(400)]
    odd = ["été", "naïve", "дом", "水", "空 気", "🙂", "γλώσσα", "x_1 = f(y);", "it's", "WE'LL", "\n\n", "\t"]
    out = []
    for _ in range(n_word):
        r = rng.random()
        w = stock[min(int(rng.expovariate(1 / 60)), 399)]
        if r < 0.04:
            w = str(rng.randint(0, 99999))
        elif r < 0.08:
            w = rng.choice(odd)
        elif r < 0.16:
            w = w.capitalize() + rng.choice([",", ".", ";", "!", "?\n"])
        out.append(w)
    return " ".join(out)


def make_tokenizer(folder, family, seed, n_ctx):
    f = FAMILIES[family]
    first = family == "smollm"                          # its special tokens come first, the others' last
    t = Tokenizer(models.BPE(ignore_merges=family == "llama3"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family == "smollm")
    if family == "smollm":
        t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    else:
        split = SPLIT_LLAMA3 if family == "llama3" else SPLIT_QWEN
        t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), byte_level])
    if family == "qwen":
        t.normalizer = normalizers.NFC()
    t.decoder = decoders.ByteLevel()
    n_word = VOCAB - 3 if family == "qwen" else VOCAB   # qwen: the matrix has more rows than there are tokens
    special = [AddedToken(s, special=True, normalized=False) for s in f["special"]]
    trainer = trainers.BpeTrainer(vocab_size=n_word if first else n_word - len(special), show_progress=False,
                                  special_tokens=special if first else [],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator([seeded_text(seed, 6000)], trainer)
    if not first:
        t.add_special_tokens(special)
    post = processors.ByteLevel(trim_offsets=False)
    if family == "llama3":
        bos = f["bos"]
        post = processors.Sequence([post, processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, t.token_to_id(bos))])])
    t.post_processor = post
    assert t.get_vocab_size() == n_word
    folder.mkdir(parents=True, exist_ok=True)
    t.save(str(folder / "tokenizer.json"))
    conf = {"tokenizer_class": "PreTrainedTokenizerFast" if family == "llama3" else
            {"qwen": "Qwen2Tokenizer", "smollm": "GPT2Tokenizer"}[family],
            "added_tokens_decoder": {str(t.token_to_id(s)): {
                "content": s, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                "special": True} for s in f["special"]},
            "bos_token": f["bos"], "eos_token": f["eos"], "pad_token": f["pad"], "unk_token": None,
            "add_prefix_space": False, "clean_up_tokenization_spaces": False, "model_max_length": n_ctx,
            "chat_template": f["template"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(conf, indent=1, ensure_ascii=False) + "\n")
    stop = [t.token_to_id(s) for s in f["stop"]]
    gen = {"eos_token_id": stop if len(stop) > 1 else stop[0], "do_sample": False}
    if f["bos"]:
        gen["bos_token_id"] = t.token_to_id(f["bos"])
    if f["pad"]:
        gen["pad_token_id"] = t.token_to_id(f["pad"])
    (folder / "generation_config.json").write_text(json.dumps(gen, indent=1) + "\n")
    return t, gen


def token_cases(t, family, seed):
    f = FAMILIES[family]
    s = f["special"]
    texts = ["", " ", "Hello world", "it's WE'LL they'Re", "a\r\n\n  b\t\tc   ", "12345 6 7.89", "cafe\u0301 é",
             "空気 水 дом 🙂🙃", f"x{s[0]}y {s[-1]}\n", f"{s[1]}{s[1]}z", "\u0000\u0007\u200b", seeded_text(seed + 9, 60)]
    rows = []
    for x in texts:
        t.encode_special_tokens = True                  # special strings are ordinary text
        plain = t.encode(x, add_special_tokens=False).ids
        t.encode_special_tokens = False
        rows.append({"text": x, "ids": plain, "special_ids": t.encode(x, add_special_tokens=False).ids,
                     "bos_ids": t.encode(x, add_special_tokens=True).ids})
    import jinja2
    env = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    tmpl = env.from_string(f["template"])
    chats = []
    for turns in ([("user", "Who is there?")], [("system", "Be brief."), ("user", "One\n\ntwo"), ("assistant", "Three"),
                                                ("user", f"four {s[0]}")]):
        # Contents are ordinary text: the frame is encoded with special tokens, each content without.
        marks = [f"\ue000{i}\ue001" for i in range(len(turns))]
        frame = tmpl.render(messages=[{"role": r, "content": m} for (r, _), m in zip(turns, marks)],
                            bos_token=f["bos"], add_generation_prompt=True)
        whole = frame
        for m, (_, c) in zip(marks, turns):
            whole = whole.replace(m, c)
        if any(x in c for _, c in turns for x in s):
            ids, rest = [], frame                       # cut at the special strings, then plain pieces
            import re
            for piece in re.split("(" + "|".join(map(re.escape, s)) + ")", rest):
                if piece in s:
                    ids.append(t.token_to_id(piece))
                elif piece:
                    for m, (_, c) in zip(marks, turns):
                        piece = piece.replace(m, c)
                    t.encode_special_tokens = True
                    ids += t.encode(piece, add_special_tokens=False).ids
                    t.encode_special_tokens = False
        else:
            ids = t.encode(whole, add_special_tokens=False).ids
        chats.append({"turns": [{"role": r, "content": c} for r, c in turns], "ids": ids})
    return {"texts": rows, "chats": chats}


BASE = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=VOCAB, max_position_embeddings=1024, rms_norm_eps=1e-5, initializer_range=0.02)
MODELS = {
    "tiny-llama": dict(family="llama3", cls="Llama", seed=1, conf=dict(
        num_hidden_layers=3, tie_word_embeddings=False, rope_parameters=dict(
            rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=64))),
    "tiny-llama-yarn": dict(family="llama3", cls="Llama", seed=2, layout=4, conf=dict(
        num_hidden_layers=2, tie_word_embeddings=True, rope_parameters=dict(
            rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=256))),
    "tiny-llama-linear": dict(family="smollm", cls="Llama", seed=3, layout=4, dtype="bfloat16", conf=dict(
        num_hidden_layers=2, tie_word_embeddings=True, rope_parameters=dict(
            rope_type="linear", rope_theta=10000.0, factor=2.5))),
    "tiny-qwen2": dict(family="qwen", cls="Qwen2", seed=4, shard="120KB", conf=dict(
        num_hidden_layers=2, tie_word_embeddings=True, rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0))),
    "tiny-qwen3": dict(family="qwen", template=QWEN_PLAIN, cls="Qwen3", seed=5, conf=dict(
        num_hidden_layers=2, head_dim=32, tie_word_embeddings=False, rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0))),
    "tiny-hybrid": dict(family="smollm", cls="Llama", seed=6, dtype="bfloat16", gain=(1.3, 1.0), conf=dict(
        hidden_size=96, num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=3, head_dim=16, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0))),
}


def init(model, seed, dtype, qk=1.5, gain=1.2):
    """Wide enough that attention is peaked and the logits differ by whole units; values that dtype holds."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        z = torch.randn(p.shape, generator=g)
        if "norm" in name:
            z = 1 + 0.2 * z
        elif name.endswith("bias"):
            z = 0.5 * z
        elif "embed" in name or "lm_head" in name:
            z = 0.25 * z
        else:                                           # gain per square root of the inputs
            z = (qk if "q_proj" in name or "k_proj" in name else gain) * z / p.shape[1] ** 0.5
        p.data.copy_(z.to(dtype).float())                # the rotary buffers stay f32, as transformers keeps them


def quantised(m, kind):
    """The model with every matrix rounded to `kind` and expanded; q8_0: 32 values share an f16 scale."""
    def one(x):
        if kind == "bf16":
            return hybrid_ref.to_bf16(x)
        b = x.astype(np.float32).reshape(-1, 32)        # f32 steps as GGUF's writers take them: halves are common in bf16
        d = np.abs(b).max(1, keepdims=True) / np.float32(127)
        y = b * np.divide(np.float32(1), d, out=np.zeros_like(d), where=d > 0)
        q = np.trunc(y.astype(np.float64) + np.copysign(0.5, y))  # halves away from zero
        return (q.astype(np.float64) * d.astype(np.float16).astype(np.float64)).reshape(x.shape)
    return {k: one(v) if v.ndim == 2 else v for k, v in m.t.items()}


@torch.no_grad()
def run_hf(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()


def greedy(model, ids, n):
    """Ids and the smallest top-2 gap; every step is a whole forward, so no cache is trusted."""
    out, gap = [], np.inf
    for _ in range(n):
        row = run_hf(model, ids + out)[-1]
        a, b = np.partition(row, -2)[-2:]
        gap = min(gap, abs(float(b - a)))
        out.append(int(row.argmax()))
    return out, gap


def layout4(folder, dtype):
    """config.json as transformers 4 wrote it."""
    path = folder / "config.json"
    c = json.loads(path.read_text())
    rope = c.pop("rope_parameters")
    c["rope_theta"] = rope.pop("rope_theta")
    c["rope_scaling"] = rope
    c.pop("dtype", None)
    c["torch_dtype"] = dtype
    c["transformers_version"] = "4.46.0"
    c.pop("head_dim", None)                             # older files leave it out where it is d / heads
    path.write_text(json.dumps(c, indent=2, sort_keys=True) + "\n")


def make(name, spec):
    folder = OUT / name
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    conf = {**BASE, **spec["conf"]}
    if spec.get("template"):
        FAMILIES["qwen"] = {**FAMILIES["qwen"], "template": spec["template"]}
    tok, gen = make_tokenizer(folder, spec["family"], spec["seed"], conf["max_position_embeddings"])
    conf["bos_token_id"], conf["eos_token_id"] = gen.get("bos_token_id"), gen["eos_token_id"]
    conf["pad_token_id"] = gen.get("pad_token_id")
    prompt = tok.encode(seeded_text(spec["seed"] + 100, 300), add_special_tokens=False).ids[:200]
    assert len(prompt) == 200
    dtype = spec.get("dtype", "float32")
    cls, ccls = getattr(transformers, spec["cls"] + "ForCausalLM"), getattr(transformers, spec["cls"] + "Config")
    stop = {gen["eos_token_id"]} if isinstance(gen["eos_token_id"], int) else set(gen["eos_token_id"])
    for seed in range(1000 * spec["seed"], 1000 * spec["seed"] + 400):
        model = cls._from_config(ccls(**conf), attn_implementation="eager").float().eval()
        init(model, seed, getattr(torch, dtype), *spec.get("gain", ()))
        ids, gap = greedy(model, prompt, 32)
        if "-v" in sys.argv:
            print(name, seed, round(gap, 5), len(set(ids)), stop & set(ids))
        if gap < 2e-3 or len(set(ids)) < 20 or stop & set(ids):
            continue
        logits = run_hf(model, prompt)
        m = hybrid_ref.Model(folder, {k: v.double().numpy() for k, v in model.state_dict().items()}, model.config.to_dict())
        exact = m.prefill(prompt)
        noise = float(np.abs(logits - exact).max())
        if "-v" in sys.argv:
            print("  noise", noise)
        if noise < 2.5e-5:                              # leaves the engine most of the 1e-4 it may differ by
            break
    else:
        raise SystemExit(f"{name}: no seed gives a clear greedy run")
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=spec.get("shard", "100MB"))
    if spec.get("layout") == 4:
        layout4(folder, dtype)
    (folder / "generation_config.json").write_text(json.dumps(gen, indent=1) + "\n")

    ref = folder / "ref"
    shutil.rmtree(ref, ignore_errors=True)
    ref.mkdir()
    np.save(ref / "logits.npy", logits.astype("<f4"))
    (ref / "prompt.txt").write_text(" ".join(map(str, prompt)) + "\n")
    (ref / "greedy.txt").write_text(" ".join(map(str, ids)) + "\n")
    assert np.abs(hybrid_ref.Model(folder).prefill(prompt) - exact).max() < 1e-9  # what was saved is what was run
    info = {"seed": seed, "greedy_gap": round(gap, 6), "logit_std": round(float(logits.std()), 4),
            "f32_minus_f64": noise, "kv": {}, "weights": {}}
    for kind in ("bf16", "q8_0"):
        q = hybrid_ref.Model(folder, quantised(m, kind), m.cfg).prefill(prompt)
        np.save(ref / f"{kind}.npy", q[7::8].astype("<f4"))
        info["weights"][kind] = float(np.abs(q - exact).max())
    for kind in ("f16", "bf16", "q8"):
        r = m.prefill(prompt, rnd=hybrid_ref.KV_ROUND[kind])
        np.save(ref / f"kv_{kind}.npy", r[7::8].astype("<f4"))
        info["kv"][kind] = float(np.abs(r - exact).max())
    (ref / "ref.json").write_text(json.dumps(info, indent=1) + "\n")
    (ref / "tokens.json").write_text(json.dumps(token_cases(tok, spec["family"], spec["seed"]), ensure_ascii=True) + "\n")
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    print(f"{name}: {size / 1e3:.0f} kB, {len(set(ids))} distinct greedy ids, {info}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for key in [a for a in sys.argv[1:] if a != "-v"] or MODELS:
        make(key, MODELS[key])
