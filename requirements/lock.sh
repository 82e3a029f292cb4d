#!/usr/bin/env bash
# Resolves pyproject.toml into the lock files (the command behind `make lock`).
#
# usage: requirements/lock.sh UV TORCH_WHEELS [--upgrade]
#   UV            the uv to resolve with
#   TORCH_WHEELS  where the CPU build of torch is listed: a folder or a page of links
#
# uv.lock is not used: it writes down the addresses of the registry it was made with.
set -euo pipefail
cd "$(dirname "$0")"

uv=$1
export UV_FIND_LINKS=$2
shift 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

compile() {
    "$uv" pip compile --quiet --python-version 3.11 --override overrides.txt \
        --no-header --no-annotate --no-emit-index-url --no-emit-find-links "$@"
}

# One resolution of everything first; the locks are cut out of it, so that they never disagree. What
# is locked now stays, unless an upgrade is asked for.
cp full.lock "$scratch/all.lock" 2>/dev/null || true
compile ../pyproject.toml companions.in --extra engine --extra ucx --extra nixl --extra streamer --extra ray --extra kubernetes \
    --extra dev "$@" --output-file "$scratch/all.lock"

# torch comes from another index than the rest, and a machine's own copy of it may be another build of the
# same version: its hash stays out. uv checks every hash that is there.
lock() {
    local name=$1
    shift
    compile ../pyproject.toml "$@" --constraint "$scratch/all.lock" --generate-hashes --no-emit-package torch \
        --output-file "$scratch/$name.lock"
    {
        echo "# Made by \`make lock\` from pyproject.toml; not edited by hand."
        grep -v -e '^# The following packages were excluded' -e '^# torch' "$scratch/$name.lock"
        if [[ $name == full || $name == image-worker ]]; then grep '^torch==' "$scratch/all.lock"; fi
    } >"$name.lock"
}

lock light --universal --extra kubernetes --extra dev
lock full --python-platform x86_64-manylinux_2_28 --extra dev --extra engine --extra ucx --extra nixl --extra streamer --extra ray --extra kubernetes
# What the images hold: the same without what only developers need.
lock image-light --universal --extra kubernetes
lock image-worker --python-platform x86_64-manylinux_2_28 --extra engine --extra ucx --extra nixl --extra streamer --extra ray
lock image-cuda --python-platform x86_64-manylinux_2_28 --extra ucx --extra nixl --extra ray  # what vLLM's own image may lack
echo hatchling | compile - --universal --constraint "$scratch/all.lock" --generate-hashes --output-file image-build.lock
echo "uv==$("$uv" --version | cut -d' ' -f2)" |
    "$uv" pip compile --quiet - --universal --python-version 3.11 --generate-hashes \
        --no-header --no-annotate --no-emit-index-url --no-emit-find-links --output-file installer.lock
