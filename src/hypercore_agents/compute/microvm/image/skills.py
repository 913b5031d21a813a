"""The operator's skills in an image: taken when it is built, at `/opt/hypercore-agents/skills` in the guest.

`image build` takes what is in SKILLS_DIR into `skills/` of the folder of images, and what is there is an input of the
image: other skills, another image. So `find` knows without any setting which image is current. The guest's root is
read-only, and everything in it is root's.
"""

import hashlib
import shutil
from pathlib import Path

from hypercore_agents.compute.microvm.image.commands import remove_tree
from hypercore_agents.compute.microvm.image.images import ImageError

IN_GUEST = Path("opt/hypercore-agents/skills")
_LARGEST_BYTES = 256 * 2**20


def take_skills(source: Path, folder: Path) -> None:
    """Make `source` the skills of the images that are built in `folder` from now on. Raises ImageError."""
    _check(source)
    new, place = folder / ".skills-new", folder / "skills"
    if new.exists():
        remove_tree(new)
    folder.mkdir(parents=True, exist_ok=True)
    put_skills(source, new)
    if place.exists():
        remove_tree(place)
    new.rename(place)


def put_skills(source: Path, target: Path) -> None:
    """Copy skills so that everybody may read them; links are followed, since nothing else is in the guest."""
    shutil.copytree(source, target)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


def skills_id(folder: Path) -> str | None:
    """Name the state of a folder of skills, None when there are none."""
    digest, some = hashlib.sha256(), False
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file():
            some = True
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder)}\0{len(content)}\0{path.stat().st_mode & 0o100}\0".encode())
            digest.update(content)
    return digest.hexdigest()[:16] if some else None


def _check(source: Path) -> None:
    if not source.is_dir():
        raise ImageError(f"there is no folder of skills {source}")
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    if size > _LARGEST_BYTES:
        raise ImageError(
            f"skills in {source} are {size >> 20} MB together; {_LARGEST_BYTES >> 20} MB fit into an image"
        )
