"""Running the programs that build an image, so that an interrupted build leaves neither processes nor mounts."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hypercore_agents.compute.microvm.image.images import ImageError

_NEEDS = {
    "mmdebstrap": "mmdebstrap",
    "mksquashfs": "squashfs-tools",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "dpkg-deb": "dpkg",
}
_LAST_WORDS = 2000


def check_host() -> None:
    """Raise ImageError naming all that this host lacks for a build, with the remedy."""
    if os.geteuid() != 0:
        raise ImageError("building an image needs root; run: sudo hypercore-agents image build")
    missing = sorted({package for program, package in _NEEDS.items() if shutil.which(program) is None})
    if missing:
        raise ImageError(f"building an image needs more packages; run: apt-get install -y {' '.join(missing)}")


def run(command: Sequence[str | Path], *, confined: bool = False, cwd: Path | None = None) -> str:
    """Run a program to its end and return what it printed. Raises ImageError with its last words.

    It dies with this process. `confined` gives it mounts and process ids of its own: what it mounts and starts is gone
    when it is, even after kill -9.
    """
    words: list[str | Path] = ["setpriv", "--pdeathsig", "KILL"]
    if confined:
        words += ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    process = subprocess.Popen(  # noqa: S603 - programs and arguments are this package's
        [*words, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=cwd,
        env=environment,
    )
    try:
        said, _ = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode != 0:
        raise ImageError(f"{command[0]} failed ({process.returncode}): {said[-_LAST_WORDS:].strip()}")
    return said


def remove_tree(path: Path) -> None:
    """Remove a folder of ours, but never through a mount: below one may be the host's own devices."""
    real = os.path.realpath(path)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if line.split()[4].startswith(real + "/"):
            raise ImageError(f"{path} has something mounted in it; unmount {line.split()[4]} and try again")
    shutil.rmtree(path, ignore_errors=True)
