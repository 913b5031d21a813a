#!/usr/bin/env bash
# Sets up and starts the whole platform on this machine, waits until it is healthy and returns.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"

usage() {
  cat <<'TEXT'
usage: deploy-claude-agents.sh [--demo] [--monitoring] | --stop [--purge] | --help

  (nothing)   start with your Claude API key (ANTHROPIC_API_KEY, in the environment or in .env)
  --demo      start; without a key, on the built-in simulator of the Claude API
  --monitoring
              also run Prometheus and Alertmanager, where they are installed
  --stop      stop everything that this script started, agents included
  --purge     with --stop: also delete the state (database, sealed keys, logs)

State lives in one folder: STATE_DIR, by default .state in the checkout.
TEXT
}

action=start demo=() purge=() monitoring=()
for argument in "$@"; do
  case $argument in
    --demo) demo=(--demo) ;;
    --monitoring) monitoring=(--monitoring) ;;
    --stop) action=stop ;;
    --purge) purge=(--purge) ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; fail "" "unknown argument: $argument" ;;
  esac
done
if [ "$action" = start ] && [ ${#purge[@]} -gt 0 ]; then fail "--purge goes with --stop"; fi
if [ "$action" = stop ] && [ ${#demo[@]} -gt 0 ]; then fail "--stop needs no --demo: it stops whatever runs"; fi

cd "$root"
export STATE_DIR=${STATE_DIR:-$( (sed -n 's/^STATE_DIR=//p' .env 2>/dev/null | tail -n 1) || : )}
export STATE_DIR=${STATE_DIR:-$root/.state}

if [ "$action" = stop ]; then
  if [ ! -x "$venv/bin/hypercore-agents" ]; then echo "nothing was running"; exit 0; fi
  exec "$venv/bin/hypercore-agents" down "${purge[@]}"
fi
bootstrap requirements/runtime.lock
exec "$venv/bin/hypercore-agents" up --detach "${demo[@]}" "${monitoring[@]}"
