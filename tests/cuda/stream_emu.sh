#!/bin/sh
# Builds build/check-emu/stream_emu from the repository root: stream.cu, stream_major.cu, stream_rows.cu and stream_codes.cu of src/ops/cuda on the CPU (emu.h) with ASan; CUDA_HOME for the headers.
set -e
d=build/check-emu
mkdir -p "$d"
san=${SAN--fsanitize=address}
for f in dtype memory status machine copy; do ${CC:-gcc} -O2 -std=c11 -D_GNU_SOURCE -Iinclude -Isrc -c "src/base/$f.c" -o "$d/stream-$f.o"; done
for f in src/ops/cuda/stream.cu src/ops/cuda/stream_major.cu src/ops/cuda/stream_rows.cu src/ops/cuda/stream_codes.cu tests/cuda/stream_emu.cpp tests/cuda/emu.cpp; do
    pre='-include emu.h -include emu_stream.h'; [ "$f" != tests/cuda/emu.cpp ] || pre= # (it defines what emu.h declares)
    g++ -std=c++17 -O1 -g $san -DLG_CUDA_EMU -DLG_CUDA_ARCH_90a -DSTREAM_LEAST=0 $pre -Iinclude -Isrc -Itests/cuda "-I${CUDA_HOME:-/usr/local/cuda}/include" \
        -x c++ -c "$f" -o "$d/stream-$(basename "$f").o"
done
g++ $san "$d"/stream-*.o -lm -o "$d/stream_emu"
