#!/bin/sh
# Every command on the CPU and on the GPU, results compared: tests/gpu.py. Without a GPU it is skipped, and says so.
#   LONGAN      program (build-cuda/longan)
#   LG_DEVICE   cuda; cuda:1; or ref: a dry run of the checks against the plain C specification, any build will do
#   LONGAN_SMOLLM2, JOBS (6), ONLY: see tests/gpu.py
set -u
cd "$(dirname "$0")/.." || exit 1
longan=${LONGAN:-build-cuda/longan}
device=${LG_DEVICE:-cuda}
command -v python3 >/dev/null 2>&1 || { echo "skip: python3 is missing"; exit 77; }
[ -x "$longan" ] || { echo "skip: $longan is not built (make cuda): NOTHING OF THE CUDA BACK END WAS TESTED"; exit 77; }
case $device in
cuda*)
    if ! "$longan" info --devices 2>/dev/null | grep -q '^cuda:[0-9]'; then
        err=$("$longan" generate -m tests/fixtures/tiny-llama -p x --device cuda 2>&1 >/dev/null)
        rc=$?
        echo "skip: $longan finds no GPU ($err): NOTHING ELSE OF THE CUDA BACK END WAS TESTED"
        # What can be: a program without a GPU runs, and says in one line why it has none.
        case $rc:$err in
        1:*"device cuda: no device: "*) [ "$(echo "$err" | wc -l)" -eq 1 ] && { echo "1 passed, 0 failed, 1 skipped"; exit 0; } ;;
        esac
        echo "FAIL without a GPU: exit $rc: $err"
        echo "0 passed, 1 failed, 1 skipped"
        exit 1
    fi
    ;;
esac
exec python3 tests/gpu.py --longan "$longan" --device "$device" --jobs "${JOBS:-6}" ${ONLY:+--only "$ONLY"}
