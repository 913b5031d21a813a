# Sourced by the other scripts: finds Python, makes the virtual environment and installs the locked requirements.
# Usage: bootstrap LOCK_FILE. Afterwards "$venv/bin" has all programs.
# HYPERCORE_VENV chooses the folder of the virtual environment (default: .venv in the checkout).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${HYPERCORE_VENV:-$root/.venv}

fail() { printf '%s\n' "$@" >&2; exit 2; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "Python 3.11 or newer was not found. On Debian 12 or Ubuntu 24.04:" \
    "  sudo apt-get install -y python3 python3-venv"
}

bootstrap() {
  local lock=$1 python stamp wanted
  python=$(find_python) || exit $?
  stamp=$venv/.installed
  wanted=$(cat "$root/$lock" "$root/pyproject.toml" | sha256sum | cut -d' ' -f1)
  if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$lock $wanted" ]; then
    return
  fi
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "Python's venv module is missing. On Debian or Ubuntu:" "  sudo apt-get install -y python3-venv"
  echo "installing into $venv (about 700 MB, most of it the Claude CLI) ..." >&2
  if [ ! -x "$venv/bin/python" ]; then
    "$python" -m venv "$venv" || fail "could not make a virtual environment in $venv"
  fi
  rm -f "$stamp"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r "$root/$lock" ||
    fail "could not install $lock; is the package index reachable?"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e "$root" ||
    fail "could not install the project from $root"
  printf '%s' "$lock $wanted" >"$stamp"
}
