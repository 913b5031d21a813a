#!/usr/bin/env bash
# Updates the lock files after a change of pyproject.toml. Needs uv (pip install uv).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lock() {
  uv pip compile --quiet pyproject.toml --extra postgres --extra microvm --extra tracing --extra loadtest --generate-hashes --no-header --no-annotate \
    --python-version 3.11 --group build "$@" >/dev/null
}
lock -o requirements/runtime.lock
lock --group dev -o requirements/dev.lock
