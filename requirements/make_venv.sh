#!/usr/bin/env bash
# make_venv.sh PYTHON DIRECTORY: a virtual environment with pip, also where the system's Python comes without either.
set -euo pipefail
python=$1 directory=$2

[ -x "$directory/bin/python" ] && "$directory/bin/python" -m pip --version >/dev/null 2>&1 && exit 0
if [ -z "$python" ]; then
    echo "No Python 3.10, 3.11 or 3.12 was found: install one, or name it with: make install PYTHON=/path/to/python3" >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then # Debian and Ubuntu ship both in a package of their own
    package=$("$python" -c 'import sys; print(f"python{sys.version_info[0]}.{sys.version_info[1]}-venv")')
    if [ "$(id -u)" = 0 ]; then
        as_root=""
    elif sudo -n true 2>/dev/null; then
        as_root="sudo -n"
    else
        echo "This Python cannot make virtual environments: run 'sudo apt-get install $package', then make again." >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    $as_root apt-get update -qq
    $as_root apt-get install -y -qq --no-install-recommends "$package"
fi
rm -rf "$directory"
"$python" -m venv "$directory"
