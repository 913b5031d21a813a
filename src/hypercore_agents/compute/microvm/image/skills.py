"""The operator's skills in an image: taken when it is built, at `/opt/hypercore-agents/skills` in the guest.

`image build` takes the skills in SKILLS_DIR into `skills/` of the folder of images, and what is there is an input of
the image: other skills, another image, whose manifest names each with its hash. So `find` knows without any setting
which image is current. The guest's root is read-only, and everything in it is root's.

A skill that sessions could not use is refused here, where the operator is, and not at somebody's first turn. Of what
lies beside the skills, plain files and hidden entries are left out; any other folder must be a skill. An empty folder
means no skills.
"""

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from hypercore_agents.api.skills import LONGEST_FRONTMATTER, MANIFEST, fault_in, is_skill_name
from hypercore_agents.compute.microvm.image.commands import remove_tree
from hypercore_agents.compute.microvm.image.images import ImageError

IN_GUEST = Path("opt/hypercore-agents/skills")
_LARGEST_BYTES = 256 * 2**20
_MOST_FILES = 10_000


def take_skills(source: Path, folder: Path) -> None:
    """Make the skills in `source` those of the images that are built in `folder` from now on. Raises ImageError."""
    try:
        names = _checked(source)
        new, place = folder / ".skills-new", folder / "skills"
        if new.exists():
            remove_tree(new)
        new.mkdir(parents=True)
        for name in names:
            put_skills(source / name, new / name)
        if place.exists():
            remove_tree(place)
        new.rename(place)
    except OSError as error:
        raise ImageError(f"skills cannot be taken from {source}: {error}") from error


def put_skills(source: Path, target: Path) -> None:
    """Copy skills so that everybody may read them; links are followed, since nothing else is in the guest."""
    shutil.copytree(source, target)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


def hashes(folder: Path) -> dict[str, str]:
    """Return a hash of each skill in a folder: its files' names, contents, and which of them are programs.

    Links are followed as the copy follows them, so what was taken has the hash of what it was taken from. Raises
    ImageError at what cannot be copied, and OSError.
    """
    found = {}
    for skill in _folders_of(folder) if folder.is_dir() else ():
        digest = hashlib.sha256()
        for path in sorted(_files(skill, ())):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(skill)}\0{len(content)}\0{path.stat().st_mode & 0o100}\0".encode())
            digest.update(content)
        found[skill.name] = digest.hexdigest()
    return found


def skills_id(folder: Path) -> str | None:
    """Name the state of a folder of skills, None when there are none."""
    named = [f"{name} {digest}\n" for name, digest in hashes(folder).items()]
    return hashlib.sha256("".join(named).encode()).hexdigest()[:16] if named else None


def _checked(source: Path) -> list[str]:
    """Return the names of the skills in a folder. Raises ImageError about the first that is none."""
    if not source.is_dir():
        raise ImageError(f"skills: there is no folder of skills {source}")
    folders = _folders_of(source)
    size = count = 0
    for skill in folders:
        if not is_skill_name(skill.name):
            raise ImageError(
                f"skills: {skill.name!r} cannot be the name of a skill; take a-z, 0-9 and - between them, at most 64"
            )
        for path in _files(skill, ()):
            size, count = size + path.stat().st_size, count + 1
        manifest = skill / MANIFEST
        if not manifest.is_file():
            raise ImageError(f"skills: {skill} is no skill: it has no {MANIFEST}; write one, or move it away")
        with manifest.open(encoding="utf-8", errors="replace") as file:
            fault = fault_in(file.read(LONGEST_FRONTMATTER), skill.name)
        if fault is not None:
            raise ImageError(f"skills: {fault}")
    if size > _LARGEST_BYTES or count > _MOST_FILES:
        raise ImageError(
            f"skills: skills in {source} are {count} files of {size >> 20} MB together; "
            f"{_MOST_FILES} files and {_LARGEST_BYTES >> 20} MB fit into an image"
        )
    return [path.name for path in folders]


def _folders_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_file())


def _files(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Yield the files below a folder, links followed. Raises ImageError at what cannot be copied."""
    here = folder.stat()
    if (here.st_dev, here.st_ino) in above:
        raise ImageError(f"skills: {folder} leads back to a folder that it is in; remove that link")
    with os.scandir(folder) as listing:
        entries = [*listing]
    for entry in entries:
        try:
            mode = entry.stat().st_mode
        except FileNotFoundError:
            raise ImageError(f"skills: {entry.path} is a link to nothing; remove it, or mend it") from None
        if stat.S_ISDIR(mode):
            yield from _files(Path(entry.path), (*above, (here.st_dev, here.st_ino)))
        elif stat.S_ISREG(mode):
            yield Path(entry.path)
        else:
            raise ImageError(f"skills: {entry.path} is neither a file nor a folder; remove it")
