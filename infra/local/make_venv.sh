#!/bin/sh
# Make the virtual environment with the first Python from 3.11 to 3.13 that is found; keep one that is there.
set -eu
venv=$1

suitable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

if [ -x "$venv/bin/python" ] && suitable "$venv/bin/python"; then
    exit 0
fi
for python in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if command -v "$python" >/dev/null && suitable "$python"; then
        echo "making $venv with $($python --version); installing takes a few minutes …"
        exec "$python" -m venv --clear "$venv"
    fi
done
echo "ddpm needs Python 3.11, 3.12 or 3.13 with venv; found: $(python3 --version 2>&1 || echo none). Set PYTHON=/path/to/python3.1x" >&2
exit 2
