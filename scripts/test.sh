#!/usr/bin/env bash
# Sets up what the tests need and runs every check, as CI does: lint, formatting, types, layers, tests.
#   scripts/test.sh [PYTEST ARGUMENTS]        everything
#   scripts/test.sh unit [PYTEST ARGUMENTS]   the unit tests that need Python packages only
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"
cd "$root"

# Test files run in parallel, long ones first: most of their time is waiting for processes.
workers=$(($(nproc) < 4 ? 2 : 4))

if [ "${1:-}" = unit ]; then
  shift
  bootstrap requirements/dev.lock
  export PATH=$venv/bin:$PATH
  exec pytest tests/unit -n "$workers" --dist loadfile --no-loadscope-reorder \
    -m "not (root or qemu or postgres or prometheus or docker or browser)" "$@"
fi

# System packages that the tests use: installed as root, listed otherwise.
missing=()
while read -r program package; do
  command -v "$program" >/dev/null 2>&1 || missing+=("$package")
done <<'PACKAGES'
git git
pg_lsclusters postgresql
prometheus prometheus
prometheus-alertmanager prometheus-alertmanager
qemu-system-x86_64 qemu-system-x86
mmdebstrap mmdebstrap
mksquashfs squashfs-tools
mke2fs e2fsprogs
nft nftables
busybox busybox-static
PACKAGES
"$(find_python)" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
  else
    fail "The tests need these system packages:" "  sudo apt-get install -y ${missing[*]}" \
      "Without them, run the unit tests:" "  ./scripts/test.sh unit"
  fi
fi

bootstrap requirements/dev.lock
export PATH=$venv/bin:$PATH
ruff check .
ruff format --check --quiet .
mypy
lint-imports
# Builds the image of microVMs once per machine and state of the sources; only root can build it.
if [ "$(id -u)" = 0 ] && command -v mmdebstrap >/dev/null 2>&1; then hypercore-agents image build; fi
exec pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
