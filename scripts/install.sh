#!/usr/bin/env bash
# Sourced by quickstart.sh and test.sh: makes .venv (or reuses it), installs this project into it, and sets $PYTHON.
#
# Usage: source scripts/install.sh [EXTRA]
#
#   PYTHON_BIN           interpreter to build the environment with (default: python3)
#   ECHO4O_TORCH_INDEX   package index to take torch from, for example a CPU-only one (default: pip's own settings)

extra=${1:-}
venv=.venv
python_bin=${PYTHON_BIN:-python3}

"$python_bin" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "echo4o needs Python 3.10 or newer; $python_bin is older. Set PYTHON_BIN to another interpreter." >&2
    exit 1
}

# What is installed is named by a stamp: the project file, the extra and the interpreter.
stamp=$("$python_bin" - "$extra" <<'PY'
import hashlib, pathlib, sys
text = pathlib.Path("pyproject.toml").read_bytes() + repr((sys.argv[1:], sys.version, str(pathlib.Path.cwd()))).encode()
print(hashlib.sha256(text).hexdigest()[:16])
PY
)
stamp_file=$venv/.installed-${extra:-base}

if [[ ! -x $venv/bin/python ]]; then
    echo "== creating $venv"
    "$python_bin" -m venv "$venv"
fi
if [[ ! -f $stamp_file || $(<"$stamp_file") != "$stamp" ]]; then
    echo "== installing echo4o${extra:+[$extra]} into $venv (a minute or two; later runs reuse it)"
    if [[ -n ${ECHO4O_TORCH_INDEX:-} ]]; then
        "$venv/bin/python" -m pip install --quiet --index-url "$ECHO4O_TORCH_INDEX" "torch>=2.13,<2.14"
    fi
    "$venv/bin/python" -m pip install --quiet --editable ".${extra:+[$extra]}"
    echo "$stamp" >"$stamp_file"
fi
PYTHON=$venv/bin/python
