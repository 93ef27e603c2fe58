#!/bin/sh
# Builds decode_check from the repository root: `sh tests/cuda/decode_check.sh gpu` (nvcc, CUDA_ARCH=90a), `ways` (that, and blocks count which
# ways they go: not for timing) or `emu` (g++ with ASan, the kernels on the CPU, segments merged by helpers from 12 blocks on, of little weight to begin, selection with
# small blocks and samples that often fail; CUDA_HOME for the headers). The result is build/check-KIND/decode_check.
set -e
kind=${1:-emu}
d=build/check-$kind
mkdir -p "$d"
for f in src/ops/select.c src/ops/ref/attend.c src/base/dtype.c src/base/memory.c src/base/status.c src/base/machine.c; do
    ${CC:-gcc} -O2 -std=c11 -D_GNU_SOURCE -Iinclude -Isrc -c "$f" -o "$d/decode-$(basename "$f" .c)-$(basename "$(dirname "$f")").o"
done
pids=
for f in src/ops/cuda/decode.cu src/ops/cuda/decode_select.cu src/ops/cuda/observe.cu tests/cuda/decode_check.cu; do
    o=$d/decode-$(basename "$f").o
    if [ "$kind" != emu ]; then
        a=${CUDA_ARCH:-90a}
        ways=
        if [ "$kind" = ways ]; then
            case $f in
            */decode.cu) ways="-include tests/cuda/took.cuh -DTOOK=took_attend" ;;
            */decode_select.cu) ways="-include tests/cuda/took.cuh -DTOOK=took_select" ;;
            *) ways=-DCOUNT_WAYS ;;
            esac
        fi
        # shellcheck disable=SC2086 # options
        nvcc $ways -O3 -lineinfo -std=c++17 -gencode "arch=compute_$a,code=sm_$a" -Iinclude -Isrc -Itests/cuda -c "$f" -o "$o" &
    else
        g++ -std=c++17 -O1 -g ${SAN--fsanitize=address} -DLG_CUDA_EMU -include emu.h -DDEC_MANY=12 -DDEC_BEGIN_BYTES=12000 -DSEL_SHARE=512 -DSEL_THREADS=128 -DSEL_SAMPLE_BITS=9 -DSEL_LONGER=3000 -DSEL_SIGMAS=1 -DSEL_ROOM=1024 -Iinclude -Isrc -Itests/cuda "-I${CUDA_HOME:-/usr/local/cuda}/include" \
            -x c++ -c "$f" -o "$o" &
    fi
    pids="$pids $!"
done
for p in $pids; do wait "$p"; done
if [ "$kind" != emu ]; then
    a=${CUDA_ARCH:-90a}
    nvcc -cudart static -gencode "arch=compute_$a,code=sm_$a" "$d"/decode-*.o -lm -o "$d/decode_check"
else
    g++ -g ${SAN--fsanitize=address} -DLG_CUDA_EMU -Itests/cuda "-I${CUDA_HOME:-/usr/local/cuda}/include" tests/cuda/emu.cpp "$d"/decode-*.o -lm -o "$d/decode_check"
fi
