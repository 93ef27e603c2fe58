#!/bin/sh
# CUDA kernels on the CPU (tests/cuda/emu.h), under ASan: sampling, products of one row, decode attention and selection against their
# specification. Needs the headers of CUDA, no GPU.
set -u
cd "$(dirname "$0")/.." || exit 1
[ -e "${CUDA_HOME:-/usr/local/cuda}/include/cuda_runtime.h" ] || { echo "skip: no CUDA headers (CUDA_HOME)"; exit 77; }
sh tests/cuda/sample_check.sh && build/check-emu/sample_check 1 40 && sh tests/cuda/stream_emu.sh && build/check-emu/stream_emu &&
    sh tests/cuda/decode_check.sh && build/check-emu/decode_check check 1 11
