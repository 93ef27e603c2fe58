#!/bin/sh
# Builds build/check-emu/sample_check from the repository root: src/ops/cuda/sample.cu on the CPU (emu.h) with ASan; CUDA_HOME for the
# headers. On a GPU machine `make cuda` builds build-cuda/tests/cuda/sample_check.
set -e
d=build/check-emu
mkdir -p "$d"
san=${SAN--fsanitize=address}
for f in src/ops/sample.c src/base/machine.c; do ${CC:-gcc} -O2 -std=c11 -D_GNU_SOURCE -Iinclude -Isrc -c "$f" -o "$d/sample-$(basename "$f" .c).o"; done
for f in src/ops/cuda/sample.cu tests/cuda/sample_check.cu tests/cuda/emu.cpp; do
    pre='-include emu.h'; [ "$f" != tests/cuda/emu.cpp ] || pre= # (it defines what emu.h declares)
    g++ -std=c++17 -O1 -g $san -DLG_CUDA_EMU $pre -Iinclude -Isrc -Itests/cuda "-I${CUDA_HOME:-/usr/local/cuda}/include" -x c++ -c "$f" -o "$d/sample-$(basename "$f").o"
done
g++ $san "$d"/sample-*.o -lm -o "$d/sample_check"
