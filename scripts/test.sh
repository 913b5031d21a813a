#!/usr/bin/env bash
# Sets up and passes every check: formatting, lint, types, layers, tests. What CI runs. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"
cd "$root"

# System packages that the tests' real parts need; installed where we may, named where we may not.
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
    fail "the tests need more system packages:" "  sudo apt-get install -y ${missing[*]}"
  fi
fi

bootstrap requirements/dev.lock
export PATH=$venv/bin:$PATH
ruff check .
ruff format --check --quiet .
mypy
lint-imports
# The guest's image, once per machine and state of the sources; only root can build it.
if [ "$(id -u)" = 0 ] && command -v mmdebstrap >/dev/null 2>&1; then hypercore-agents image build; fi
# Files side by side, in order (the long ones come first): much of their time is waiting for real processes.
exec pytest -n "$(($(nproc) < 4 ? 2 : 4))" --dist loadfile --no-loadscope-reorder "$@"
