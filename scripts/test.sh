#!/usr/bin/env bash
# ./scripts/test.sh [pytest arguments]: lint, format check and tests, in an environment of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/install.sh dev
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000} # idle threads that spin slow down everything beside them

echo "== ruff"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .

echo "== pytest"
"$PYTHON" -m pytest "$@"
