#!/usr/bin/env python3
"""What a layer of a decode step takes on the GPU, kernel by kernel, with programmatic launches and graphs as they run.

    bench/cuda-trace.py [--cuda DIR] [--keep FILE] build-cuda/longan bench --shape llama3-8b --synthetic --depth 8k --retrieval 0 --device cuda
    bench/cuda-trace.py --read FILE

Builds cuda_trace/inject.c (CUPTI, which comes with the CUDA toolkit) and runs the command with it. The table is of the commonest sequence of
kernels from one attention of a decode step to the next, in the last steps; times are medians in us from the end of the attention before: start, end, and
what the layer gained by it (from the end of the kernel before on the same path). Tracing adds some 4% to a step, but not to a layer's period."""
import argparse
import collections
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

MARK = "dec_"  # dec_tensor, dec_fma: one a layer


def traced(command, cuda, out):
    here = pathlib.Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as tmp:
        lib = f"{tmp}/libtrace.so"
        where = [d for d in (f"{cuda}/lib64", f"{cuda}/lib", f"{cuda}/extras/CUPTI/lib64") if os.path.isdir(d)]
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", here / "cuda_trace/inject.c", "-o", lib, f"-I{cuda}/include", f"-I{cuda}/extras/CUPTI/include",
                        *(f"-L{d}" for d in where), *(f"-Wl,-rpath,{d}" for d in where), "-lcupti"], check=True)
        subprocess.run(command, check=True, env={**os.environ, "CUDA_INJECTION64_PATH": lib, "LONGAN_TRACE": str(out)})


def read(path):
    rows = []
    for line in open(path):
        start, end, stream, blocks, shared, name = line.rstrip("\n").split(" ", 5)
        rows.append((float(start), float(end), int(stream), int(blocks), int(shared), name))
    return rows


def layers(rows):
    at = [i for i, r in enumerate(rows) if MARK in r[5]]
    spans = [rows[a:b + 1] for a, b in zip(at, at[1:])]
    shape = lambda span: tuple((r[5], r[3]) for r in span)
    common = collections.Counter(map(shape, spans)).most_common(1)
    return [s for s in spans if common and shape(s) == common[0][0]]


def table(found, rows):
    ends = [r[1] for r in rows if MARK in r[5]]
    print(f"{len(found)} layers alike, {statistics.median(b - a for a, b in zip(ends, ends[1:])):.1f} us from one layer to the next (median)")
    print(f"{'kernel':<44} {'blocks':>6} {'shared':>7} {'start':>8} {'end':>8} {'after':>8}")
    last, path = 0.0, found[0][-1][2]  # the stream that the layer ends in; what runs beside it gains nothing
    for j, first in enumerate(found[0]):
        start = statistics.median(s[j][0] - s[0][1] for s in found)
        end = statistics.median(s[j][1] - s[0][1] for s in found)
        print(f"{first[5][:44]:<44} {first[3]:>6} {first[4]:>7} {start:>8.2f} {end:>8.2f} {f'{end - last:8.2f}' if first[2] == path and j else '':>8}")
        if first[2] == path:
            last = end


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cuda", default=os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    p.add_argument("--keep", help="write the trace here")
    p.add_argument("--read", help="a trace that was kept")
    p.add_argument("command", nargs=argparse.REMAINDER)
    o = p.parse_args()
    if not o.read and not o.command:
        p.error("a command to run, or --read FILE")
    with tempfile.TemporaryDirectory() as tmp:
        path = o.read or o.keep or f"{tmp}/trace.txt"
        if not o.read:
            traced(o.command, o.cuda, pathlib.Path(path).resolve())
        rows = read(path)
        found = layers(rows)
    if len(found) < 2:
        sys.exit(f"cuda-trace: no two layers alike (marked by {MARK}) among the last kernels")
    table(found, rows)


if __name__ == "__main__":
    main()
