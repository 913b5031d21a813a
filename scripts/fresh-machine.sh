#!/usr/bin/env bash
# Runs the README's commands in a clean Debian, which is made for this run and deleted afterwards.
#
# Package sources, pip's configuration, certificates, proxies and name resolution are copied from this machine, whose
# network and kernel are used. Needs root, mmdebstrap, git.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: fresh-machine.sh [--tests] [--ports FIRST] [--keep]

  --tests   also run the second command, ./scripts/test.sh
  --ports   listen on FIRST and the three ports after it, where 8080, 8090, 8091 and 8099 are taken
  --keep    keep the Debian root and print its path
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

chmod 755 "$root"  # mktemp's folder is closed to other users; a machine's root is not

# Copies a file or folder of this machine to the same path in the new root.
copy_in() {
  local path
  for path in "$@"; do
    [ -e "$path" ] || continue
    mkdir -p "$root$(dirname "$path")"
    cp -aL --remove-destination "$path" "$root$(dirname "$path")/" 2>/dev/null || :
  done
}
copy_in /etc/apt/apt.conf.d /etc/apt/trusted.gpg.d /etc/apt/keyrings /etc/apt/auth.conf.d \
  /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/xdg/pip /etc/ssl/certs/ca-certificates.crt /usr/local/share/ca-certificates \
  "$HOME/.config/pip" "$HOME/.pip"
environment=("HOME=$HOME" "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" "LANG=C.UTF-8")
while IFS='=' read -r name value; do
  case $name in
    PIP_* | UV_* | *_proxy | *_PROXY | SSL_CERT_FILE | SSL_CERT_DIR | REQUESTS_CA_BUNDLE | CURL_CA_BUNDLE)
      environment+=("$name=$value")
      [ -f "$value" ] && copy_in "$value" ;;
  esac
done < <(env)
# Package folders that pip's configuration names are mounted read-only; single files are copied. The pages of an index
# link to files next to its `simple` folder, so the parent folder is mounted.
shown=()
while read -r path; do
  path=${path%/simple}
  if [ -d "$path" ]; then shown+=("$path"); mkdir -p "$root$path"; elif [ -f "$path" ]; then copy_in "$path"; fi
done < <(python3 -m pip config list 2>/dev/null | grep -oE "(^|[ '=]|file://)/[^ ,'\\]+" | sed -E "s#^.*file://##; s#^[ '=]##" | sort -u)
elsewhere=()  # only for the first command: the tests choose free ports
if [ -n "$ports" ]; then
  elsewhere=("LISTEN_ADDR=127.0.0.1:$ports" "GATEWAY_ADDR=127.0.0.1:$((ports + 1))"
    "AUTOSCALER_ADDR=127.0.0.1:$((ports + 2))" "SIMULATOR_LISTEN=127.0.0.1:$((ports + 3))")
fi

say "a fresh clone ..."
git clone --quiet --no-hardlinks "$checkout" "$root/srv/hypercore-agents"

# Runs a command in new namespaces, so that background processes end with the shell. That shell is their init and reaps
# orphans; the final `exit` keeps bash from replacing itself with the last command. The new root is a mount point, as on a
# real machine (a plain chroot could not make mounts private), and this machine's files are not visible below it.
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
