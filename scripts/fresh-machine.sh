#!/usr/bin/env bash
# The README's commands to the letter on a machine that has nothing: a clean Debian, made for this and deleted afterwards.
#
# What a machine brings by itself (package sources, pip's configuration, certificates, proxies, name resolution) is carried
# in from this one. Needs root, mmdebstrap, git; the network and the kernel are this machine's.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: fresh-machine.sh [--tests] [--ports FIRST] [--keep]

  --tests   also run the second command, ./scripts/test.sh
  --ports   listen on FIRST and the three ports after it, where 8080, 8090, 8091 and 8099 are taken
  --keep    keep the Debian root and say where it is
TEXT
}

tests=0 ports= keep=0
while [ $# -gt 0 ]; do
  case $1 in
    --tests) tests=1 ;;
    --ports) ports=${2:?--ports needs a number}; shift ;;
    --keep) keep=1 ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
  esac
  shift
done
[ "$(id -u)" = 0 ] || { echo "fresh-machine.sh needs root" >&2; exit 2; }
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=$(mktemp -d "${TMPDIR:-/var/tmp}/fresh-machine.XXXXXX")
clean_up() {
  if [ "$keep" = 1 ]; then echo "kept: $root"; else rm -rf --one-file-system "$root"; fi
}
trap clean_up EXIT

say() { printf '%s\n' "fresh-machine: $*" >&2; }

release=$(. /etc/os-release && echo "$VERSION_CODENAME")
sources=()
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
  [ -s "$file" ] && sources+=("$file")
done
say "making a clean Debian $release ..."
mmdebstrap --quiet --mode=root --variant=minbase --include=ca-certificates,curl,python3,python3-venv \
  "$release" "$root" "${sources[@]}"

chmod 755 "$root"  # as the root of a machine is; mktemp's folder is closed to all users but its own

# Carries a file or folder of this machine to the same place there.
carry() {
  local path
  for path in "$@"; do
    [ -e "$path" ] || continue
    mkdir -p "$root$(dirname "$path")"
    cp -aL --remove-destination "$path" "$root$(dirname "$path")/" 2>/dev/null || :
  done
}
carry /etc/apt/apt.conf.d /etc/apt/trusted.gpg.d /etc/apt/keyrings /etc/apt/auth.conf.d \
  /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/xdg/pip /etc/ssl/certs/ca-certificates.crt /usr/local/share/ca-certificates \
  "$HOME/.config/pip" "$HOME/.pip"
environment=("HOME=$HOME" "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" "LANG=C.UTF-8")
while IFS='=' read -r name value; do
  case $name in
    PIP_* | UV_* | *_proxy | *_PROXY | SSL_CERT_FILE | SSL_CERT_DIR | REQUESTS_CA_BUNDLE | CURL_CA_BUNDLE)
      environment+=("$name=$value")
      [ -f "$value" ] && carry "$value" ;;
  esac
done < <(env)
# Folders of packages that pip's configuration names are shown there, read-only; single files are copied. The pages of an
# index link to files beside its `simple` folder.
shown=()
while read -r path; do
  path=${path%/simple}
  if [ -d "$path" ]; then shown+=("$path"); mkdir -p "$root$path"; elif [ -f "$path" ]; then carry "$path"; fi
done < <(python3 -m pip config list 2>/dev/null | grep -oE "(^|[ '=]|file://)/[^ ,'\\]+" | sed -E "s#^.*file://##; s#^[ '=]##" | sort -u)
elsewhere=()  # for the first command alone: the tests choose ports of their own
if [ -n "$ports" ]; then
  elsewhere=("LISTEN_ADDR=127.0.0.1:$ports" "GATEWAY_ADDR=127.0.0.1:$((ports + 1))"
    "AUTOSCALER_ADDR=127.0.0.1:$((ports + 2))" "SIMULATOR_LISTEN=127.0.0.1:$((ports + 3))")
fi

say "a fresh clone ..."
git clone --quiet --no-hardlinks "$checkout" "$root/srv/hypercore-agents"

# In namespaces of its own: whatever the commands leave running ends with the shell that ran them; that shell is their init
# and collects what is orphaned (so it must not become the last command, which is why an exit follows). The new root is a mount of
# its own, as a machine's is (a plain chroot could make no mounts private), and nothing of this machine's files is left below.
inside() {
  SHOWN="${shown[*]}" unshare --mount --pid --fork --kill-child --propagation private bash -euc '
    root=$1; shift
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs tmpfs "$root/tmp"
    for path in $SHOWN; do mount --bind -o ro "$path" "$root$path"; done
    cd "$root"
    mkdir -p .outside
    pivot_root . .outside
    umount -l .outside
    rmdir .outside
    exec "$@"
  ' bash "$root" env -i "${environment[@]}" bash -euc "cd /srv/hypercore-agents; $1; exit"
}

timed() {
  local began=$SECONDS
  say "\$ $1"
  inside "$1${2:+; $2}"
  say "\$ $1: $((SECONDS - began)) s"
}

url=http://127.0.0.1:${ports:-8080}
environment+=("${elsewhere[@]}")
timed "./scripts/deploy-claude-agents.sh --demo" "
  curl -sS --fail-with-body $url/health; echo
  curl -sS --fail-with-body $url/v1/agent/chat -H 'content-type: application/json' \
    -d '{\"user_id\": \"ada\", \"prompt\": \"Hello! Who are you?\"}'; echo
  .venv/bin/hypercore-agents chat 'Hello from the command line!' --user ada --url $url
  ./scripts/deploy-claude-agents.sh --stop"
for _ in "${elsewhere[@]}"; do unset 'environment[-1]'; done
[ "$tests" = 0 ] || timed "./scripts/test.sh"
