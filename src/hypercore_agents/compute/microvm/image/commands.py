"""Runs the programs that build an image, so that an interrupted build leaves neither processes nor mounts behind."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hypercore_agents.compute.microvm.image.errors import ImageError

_NEEDS = {
    "mmdebstrap": "mmdebstrap",
    "mksquashfs": "squashfs-tools",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "dpkg-deb": "dpkg",
}
_REPORTED_CHARACTERS = 2000


def check_host() -> None:
    """Raise ImageError with everything that this host lacks for a build, and the remedy."""
    if os.geteuid() != 0:
        raise ImageError("building an image needs root; run: sudo hypercore-agents image build")
    missing = sorted({package for program, package in _NEEDS.items() if shutil.which(program) is None})
    if missing:
        raise ImageError(f"building an image needs more packages; run: apt-get install -y {' '.join(missing)}")


def run(command: Sequence[str | Path], *, confined: bool = False, cwd: Path | None = None) -> str:
    """Run a program and return its output. Raises ImageError, with the end of the output, when it fails.

    The program is killed when this process dies. `confined` gives it new mount and pid namespaces, so that its
    mounts and child processes disappear with it, even after kill -9.
    """
    prefix: list[str | Path] = ["setpriv", "--pdeathsig", "KILL"]
    if confined:
        prefix += ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    process = subprocess.Popen(  # noqa: S603 - programs and arguments are this package's
        [*prefix, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=cwd,
        env=environment,
    )
    try:
        output, _ = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode != 0:
        raise ImageError(f"{command[0]} failed ({process.returncode}): {output[-_REPORTED_CHARACTERS:].strip()}")
    return output


def remove_tree(path: Path) -> None:
    """Remove a folder of a build. Raises ImageError if something is mounted in it, such as the host's devices."""
    real = os.path.realpath(path)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if line.split()[4].startswith(real + "/"):
            raise ImageError(f"{path} has something mounted in it; unmount {line.split()[4]} and try again")
    shutil.rmtree(path, ignore_errors=True)
