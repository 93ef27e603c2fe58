#!/bin/sh
# Compressed memory on a real model: plants facts about invented people in a long text, compresses it once, asks for all facts.
#   sh scripts/demo-memory.sh [--full] [--tokens N] [--facts N] [--device D] [--slots f32|bf16|q8] [--ratio 4|8] [--memagent N]
# Default: a 100,000-token text and 60 facts; --full: 1.75 million tokens and 500 facts. --memagent N also asks the first N questions
# by reading the text itself (no memory weights), for comparison.
# Installs and builds what is missing; the bank is kept: a second run compresses nothing. LONGAN_MEMORY_ADAPTER names the weights.
set -eu
cd "$(dirname "$0")/.."
tokens=100000 facts=60 device=cpu slots=bf16 ratio=4 memagent=0
usage() { sed -n '3p' "$0" | cut -c3- >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
    --full) tokens=1750000 facts=500; shift; continue ;;
    --tokens | --facts | --device | --slots | --ratio | --memagent) [ $# -ge 2 ] || usage ;;
    *) usage ;;
    esac
    eval "${1#--}=\$2"
    shift 2
done
cache=${LONGAN_CACHE:-.cache}
model=$cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
adapter=${LONGAN_MEMORY_ADAPTER:-}
[ -n "$adapter" ] || for f in adapters/smollm2-135m-memory*.safetensors; do [ -s "$f" ] && adapter=$f; done
[ -n "$adapter" ] && [ -s "$adapter" ] || { echo "demo-memory: no memory weights: LONGAN_MEMORY_ADAPTER=FILE" >&2; exit 1; }

sh scripts/setup.sh build demo
command -v python3 >/dev/null || { echo "demo-memory: python3 is missing" >&2; exit 1; }
longan=${LONGAN_BIN:-build/longan}
[ -n "${LONGAN_BIN:-}" ] || make -s -j"$(nproc)" all >&2
dir=$cache/demo-memory
mkdir -p "$dir"
# The text: the King James Bible as bible-kjv prints it, then the Free On-line Dictionary of Computing (package dict-foldoc, unpacked
# here, not installed), cut to the wanted length.
if [ "$tokens" -gt 1000000 ] && [ ! -s "$dir/foldoc.txt" ]; then
    command -v apt-get >/dev/null || { echo "demo-memory: apt-get is missing: a text of this length needs the package dict-foldoc" >&2; exit 1; }
    echo "demo-memory: getting the Debian package dict-foldoc (2.4 MB)" >&2
    here=$(pwd)
    mkdir -p "$dir/deb"
    (cd "$dir/deb" && apt-get -q download dict-foldoc >&2 && dpkg-deb -x dict-foldoc_*.deb x)
    gzip -dc <"$here/$dir/deb/x/usr/share/dictd/foldoc.dict.dz" >"$dir/foldoc.tmp"
    mv "$dir/foldoc.tmp" "$dir/foldoc.txt"
fi
[ -s "$dir/kjv.txt" ] || { bible -f gen1:1-rev22:21 </dev/null >"$dir/kjv.tmp" && mv "$dir/kjv.tmp" "$dir/kjv.txt"; }
exec python3 - "$longan" "$model" "$adapter" "$dir" "$tokens" "$facts" "$device" "$slots" "$ratio" "$memagent" <<'PY'
import hashlib, json, os, pathlib, subprocess, sys, time
longan, model, adapter, folder, tokens, facts, device, slots, ratio, memagent = sys.argv[1:11]
tokens, facts, ratio, memagent, folder = int(tokens), int(facts), int(ratio), int(memagent), pathlib.Path(folder)
CHUNK, TOP = 1024, 3  # the weights were trained on chunks of 512 and 1024 tokens, one window each

def run(args, **kw):
    """Output and peak resident memory of one run; its messages and its bar go to stderr."""
    p = subprocess.Popen([longan] + args, stdout=subprocess.PIPE, **kw)
    out = p.stdout.read()
    _, status, usage = os.wait4(p.pid, 0)
    if status:
        sys.exit("demo-memory: longan %s failed (status %d)" % (" ".join(args[:2]), status))
    return out, usage.ru_maxrss * 1024

# --- the text, cut to `tokens` tokens; cached by its length
work = folder / ("%d-%d" % (tokens, facts))
if not (work / "facts.json").exists():
    work.mkdir(exist_ok=True)
    text = (folder / "kjv.txt").read_bytes()
    if tokens > 1000000:
        text += (folder / "foldoc.txt").read_bytes()
    ids = subprocess.run([longan, "tokenize", "-m", model], input=text[:8 * tokens], stdout=subprocess.PIPE, check=True).stdout.split()
    plain = subprocess.run([longan, "tokenize", "-m", model, "--decode"], input=b" ".join(ids[:tokens]), stdout=subprocess.PIPE, check=True).stdout
    (work / "plain.txt").write_bytes(plain)
    if len(ids) < tokens:
        print("demo-memory: the text has %d tokens, not %d" % (len(ids), tokens), file=sys.stderr)
    subprocess.run([sys.executable, "tools/make-facts.py", str(work / "plain.txt"), str(work), "--facts", str(facts)], check=True, stdout=sys.stderr)
planted = json.loads((work / "facts.json").read_text())
text = work / "text.txt"

common = ["-m", model, "--adapter", adapter, "--device", device]
form = ["--chunk", str(CHUNK), "--window", str(CHUNK), "--ratio", str(ratio), "--slots", slots]
weights = hashlib.sha256(pathlib.Path(adapter).read_bytes()).hexdigest()[:8]
bank = work / ("r%d-%s-%s-%s.bank" % (ratio, slots, device.replace(":", ""), weights))

# --- how long: measured on the first 8 chunks
if not bank.exists():
    probe = work / "probe"
    probe.write_bytes(text.read_bytes()[:8 * CHUNK * 4])
    r = json.loads(run(["bank", "build", "-f", str(probe), "-o", str(probe) + ".bank", "--json"] + common + form)[0])
    os.unlink(probe), os.unlink(str(probe) + ".bank")
    print("about %.0f s to compress %d tokens, once (%.0f tokens/s in a probe)" % (tokens * r["seconds"] / r["n_tokens"], tokens, r["n_tokens"] / r["seconds"]), flush=True)
    out, peak = run(["bank", "build", "-f", str(text), "-o", str(bank), "--json"] + common + form)
    built = json.loads(out)
    (work / "built.json").write_text(json.dumps({"seconds": built["seconds"], "peak": peak}))
    print("compressed %d tokens into %d chunks in %.1f s (%.0f tokens/s), peak resident memory %.0f MB" %
          (built["n_tokens"], built["n_chunk"], built["seconds"], built["n_tokens"] / built["seconds"], peak / 1e6), flush=True)
else:
    print("%s is there already" % bank, flush=True)

info = json.loads(run(["bank", "info", str(bank), "--json"])[0])
full = info["n_tokens"] * info["n_layer"] * info["n_head_kv"] * info["head_dim"] * 2 * 2
print("bank %.0f MB; the full cache in f16 would be %.0f MB" % (info["file_bytes"] / 1e6, full / 1e6))

# --- all questions, one batch
began = time.monotonic()
out, peak = run(["ask", str(bank), "--mode", "lookup", "--weigh", "--top", str(TOP), "--parallel", "16" if device == "cpu" else "64", "--questions", str(work / "questions.jsonl")] + common)
seconds = time.monotonic() - began
answers = [json.loads(line) for line in out.splitlines()]

def holds(step, fact):
    """The whole sentence stands in that chunk (one that a border cuts stands in none)."""
    end = fact["byte"] + len(fact["sentence"].encode())
    return step["chunk"] is not None and step["byte_begin"] is not None and step["byte_begin"] <= fact["byte"] and end <= step["byte_end"]

right = [a["answer"].strip() == f["answer"] for a, f in zip(answers, planted)]
found = [any(holds(s, f) for s in a["steps"][:-1]) for a, f in zip(answers, planted)]
first = [holds(a["steps"][0], f) for a, f in zip(answers, planted)]
n = len(planted)
both = sum(r and g for r, g in zip(right, found))
print("\n%d questions in %.1f s, peak resident memory %.0f MB (the mapped bank counts where it was read)" % (n, seconds, peak / 1e6))
print("answers right        %4d of %d (%.1f%%)" % (sum(right), n, 100 * sum(right) / n))
print("gate: best %d hold it %4d of %d (%.1f%%); the best one alone %d (%.1f%%)" % (TOP, sum(found), n, 100 * sum(found) / n, sum(first), 100 * sum(first) / n))
print("right where they do  %4d of %d (%.1f%%)" % (both, sum(found), 100 * both / max(1, sum(found))))
print("\nfive of them:")
for i in list(range(0, n, max(1, n // 5)))[:5]:
    a, f = answers[i], planted[i]
    print("  %s\n    %s%s   bytes %s to %s, the sentence at %d: %s" %
          (f["question"], a["answer"], "" if right[i] else "  [planted: %s]" % f["answer"], a["byte_begin"], a["byte_end"], f["byte"], f["sentence"]))

# --- the same without memory weights
if memagent:
    some = work / "some.jsonl"
    some.write_text("".join(json.dumps({"question": f["question"]}) + "\n" for f in planted[:memagent]))
    began = time.monotonic()
    out, peak = run(["ask", str(text), "--mode", "memagent", "--memory-size", "256", "--max-new", "64", "--questions", str(some), "-m", model, "--device", device])
    seconds = time.monotonic() - began
    answers = [json.loads(line) for line in out.splitlines()]
    right = sum(f["answer"].lower() in a["answer"].lower() for a, f in zip(answers, planted))
    print("\nmemagent (reads the text itself, memory 256 tokens): %d of %d answers hold the fact, %.1f s" % (right, len(answers), seconds))
PY
