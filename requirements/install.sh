#!/usr/bin/env bash
# Makes a virtual environment hold exactly what a lock file names, and this package itself, editable.
# Run again it repairs: a broken environment is made anew, a stale one is brought up to date.
#
# usage: requirements/install.sh PYTHON VENV LOCK
#   PYTHON  a Python 3.11 interpreter
#   VENV    the environment's folder, inside the checkout; VENV/.ready is written when all is done and holds the checkout's path
#   LOCK    light or full
# environment:
#   TORCH_WHEELS  where the CPU build of torch is listed (a folder or a page of links) when neither uv nor pip
#                 has a place configured to find wheels
set -euo pipefail
cd "$(dirname "$0")/.."
here=$(pwd -P)

python=$1 venv=$2 lock=requirements/$3.lock

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

is_3_11() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; }

# The last value that `pip config list` shows for a setting: files first, then the environment.
pip_setting() { sed -n "s/^[a-z:]*\.$1='\(.*\)'$/\1/p" <<<"$pip_settings" | tail -n 1; }

command -v "$python" >/dev/null ||
    fail "no '$python' on the PATH. Slipstream needs Python 3.11; install it, or name it: make PYTHON=/path/to/python3.11"
is_3_11 "$python" || {
    version=$("$python" --version 2>/dev/null || echo broken)
    fail "'$python' is ${version%%$'\n'*}, not Python 3.11. Name another: make PYTHON=/path/to/python3.11"
}

# Its scripts start with the path it was made under: one that was moved with the checkout is broken too.
usable() {
    is_3_11 "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1 &&
        head -n 2 "$venv/bin/pip" | grep -qF "$here/$venv/bin/python"
}
rm -f "$venv/.ready"
if [[ -e $venv ]] && ! usable; then
    say "$venv is broken, moved or not of Python 3.11: making it anew"
    rm -rf "$venv"
fi
if [[ ! -e $venv ]]; then
    say "Making $venv with $("$python" --version)"
    "$python" -m venv "$venv" ||
        fail "'$python -m venv' failed. On Debian and Ubuntu it needs the package python3.11-venv"
fi

"$venv/bin/python" -m pip install -qq --disable-pip-version-check --require-hashes -r requirements/installer.lock
uv=$venv/bin/uv

# uv does not read pip's configuration; whoever configured pip for this machine means us too.
pip_settings=$("$venv/bin/python" -m pip config list)
find_links=$(pip_setting find-links)
index_url=$(pip_setting index-url)
cert=$(pip_setting cert)
export UV_FIND_LINKS=${UV_FIND_LINKS:-${find_links:-${TORCH_WHEELS:-}}}
# pip separates places with spaces, uv with commas
UV_FIND_LINKS=${UV_FIND_LINKS// /,}
if [[ -n $index_url ]]; then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index_url}; fi
if [[ -n $cert ]]; then export SSL_CERT_FILE=${SSL_CERT_FILE:-$cert}; fi
export VIRTUAL_ENV=$here/$venv

# Compiled now, once: without bytecode each process spends seven seconds more on importing vLLM. `sync`, since
# `install` would add what the lock leaves out on purpose.
say "Installing $lock into $venv"
quiet=()
if [[ ! -t 2 ]]; then quiet=(--quiet); fi  # a log file wants no progress bars and no list of 200 packages
env -u PYTHONDONTWRITEBYTECODE "$uv" pip sync "${quiet[@]}" --compile-bytecode "$lock"
UV_FIND_LINKS= "$uv" pip install --quiet --no-index --no-deps --no-build-isolation --editable .
echo "$here" >"$venv/.ready"
say "$venv is ready"
