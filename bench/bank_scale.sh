#!/bin/sh
# Resident memory and time of bank builds and questions over the length of the document, on the tiny checkpoint of
# tests/fixtures/memory (random weights): 10K tokens to 2M. One line per length: tokens, file MB, build s, build peak MB, ask s,
# ask peak MB, of which mapped file pages. Writes the table as CSV to stdout.
#   sh bench/bank_scale.sh [LENGTHS...]
set -eu
cd "$(dirname "$0")/.."
longan=${LONGAN_BIN:-build/longan}
dir=$(mktemp -d "${TMPDIR:-/tmp}/bank-scale.XXXXXX")
trap 'rm -rf "$dir"' EXIT
[ $# -gt 0 ] || set -- 10000 50000 200000 500000 1000000 2000000
exec_py() { python3 - "$longan" "$dir" "$@" <<'PY'
import json, os, subprocess, sys, time
longan, folder, lengths = sys.argv[1], sys.argv[2], [int(x) for x in sys.argv[3:]]
model = "tests/fixtures/memory/model"

def run(args):
    began = time.monotonic()
    p = subprocess.Popen([longan] + args, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    peak_file = peak_anon = 0
    while p.poll() is None:
        try:
            status = dict(l.split(":", 1) for l in open("/proc/%d/status" % p.pid) if ":" in l)
            peak_anon = max(peak_anon, int(status["RssAnon"].split()[0]))
            peak_file = max(peak_file, int(status["RssFile"].split()[0]))
        except (OSError, KeyError, ValueError):
            pass
        time.sleep(0.02)
    if p.returncode:
        sys.exit("bank_scale: longan %s failed" % " ".join(args[:2]))
    return time.monotonic() - began, peak_anon / 1024, peak_file / 1024

print("tokens,file_mb,build_s,build_anon_mb,build_mapped_mb,ask_s,ask_anon_mb,ask_mapped_mb")
for n in lengths:
    text, bank = os.path.join(folder, "text"), os.path.join(folder, "bank")
    with open(text, "w") as f:
        line = 0
        while f.tell() < n:
            f.write("line %d of a long log, number %d\n" % (line, line * 7919 % 10007))
            line += 1
        f.truncate(n)
    b = run(["bank", "build", "-m", model, "-f", text, "-o", bank, "--threads", "2"])
    a = run(["ask", "-m", model, bank, "number 7919", "--mode", "lookup", "--max-new", "8", "--threads", "2"])
    print("%d,%.1f,%.1f,%.1f,%.1f,%.1f,%.1f,%.1f" % ((n, os.path.getsize(bank) / 1e6) + b + a), flush=True)
    os.unlink(bank)
PY
}
exec_py "$@"
