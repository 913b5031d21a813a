#!/usr/bin/env bash
# Sets up and starts the whole platform on this machine, waits until it is healthy and returns.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"

usage() {
  cat <<'TEXT'
usage: deploy-claude-agents.sh [--demo] [--monitoring] [--microvm] | --stop [--purge] | --help

  (nothing)   start with your Claude API key (ANTHROPIC_API_KEY, in the environment or in .env)
  --demo      start; without a key, use the built-in simulator of the Claude API
  --monitoring
              also run Prometheus and Alertmanager, where they are installed
  --microvm   run agents in microVMs: installs QEMU and other packages (Debian, Ubuntu), builds the image on first
              use (about a minute), then starts; needs root
  --stop      stop everything that this script started, agents included
  --purge     with --stop: also delete the state (database, sealed keys, logs)

State lives in one folder: STATE_DIR, by default .state in the checkout.
TEXT
}

action=start demo=() purge=() monitoring=() microvm=0
for argument in "$@"; do
  case $argument in
    --demo) demo=(--demo) ;;
    --monitoring) monitoring=(--monitoring) ;;
    --microvm) microvm=1 ;;
    --stop) action=stop ;;
    --purge) purge=(--purge) ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; fail "" "unknown argument: $argument" ;;
  esac
done
if [ "$action" = start ] && [ ${#purge[@]} -gt 0 ]; then fail "--purge goes with --stop"; fi
if [ "$action" = stop ] && [ "$microvm" = 1 ]; then fail "--stop needs no --microvm: it stops whatever runs"; fi
if [ "$action" = stop ] && [ ${#demo[@]} -gt 0 ]; then fail "--stop needs no --demo: it stops whatever runs"; fi

cd "$root"

# The program parses .env, so it also provides the folder that the settings name.
export_state_dir() {
  STATE_DIR=$("$venv/bin/hypercore-agents" config get STATE_DIR --default "$root/.state") || exit $?
  export STATE_DIR
}

if [ "$action" = stop ]; then
  if [ ! -x "$venv/bin/hypercore-agents" ]; then echo "nothing was running"; exit 0; fi
  export_state_dir
  exec "$venv/bin/hypercore-agents" down "${purge[@]}"
fi

# .env holds secrets: only its owner may read it.
tighten_env_file() {
  if [ -f .env ] && [ ! -L .env ] && [ -O .env ] && [ -n "$(find .env -perm /077)" ]; then
    chmod 600 .env
    echo "made $root/.env readable only by its owner (mode 600): it may hold secrets" >&2
  fi
}

# Prepares the host for microVMs: installs the missing programs at once.
prepare_microvms() {
  [ "$(id -u)" = 0 ] || fail "MicroVMs need root for their networks and limits; run:" "  sudo $0 --microvm"
  local missing=() program package
  while read -r program package; do
    command -v "$program" >/dev/null 2>&1 || missing+=("$package")
  done <<'PACKAGES'
qemu-system-x86_64 qemu-system-x86
mmdebstrap mmdebstrap
mksquashfs squashfs-tools
mke2fs e2fsprogs
nft nftables
ip iproute2
PACKAGES
  [ ${#missing[@]} -eq 0 ] && return
  command -v apt-get >/dev/null 2>&1 || fail "MicroVMs need these packages:" "  ${missing[*]}"
  echo "installing ${missing[*]} ..." >&2
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
    >/dev/null || fail "could not install ${missing[*]}; is the package registry reachable?"
}

backend=()
tighten_env_file
if [ "$microvm" = 1 ]; then prepare_microvms; fi
bootstrap requirements/runtime.lock
export_state_dir
if [ "$microvm" = 1 ]; then
  "$venv/bin/hypercore-agents" image build >/dev/null
  backend=(--backend microvm)
fi
exec "$venv/bin/hypercore-agents" up --detach "${demo[@]}" "${monitoring[@]}" "${backend[@]}"
