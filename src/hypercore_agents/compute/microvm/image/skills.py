"""The operator's skills in an image: copied by a build, and at `/opt/hypercore-agents/skills` in the guest.

`image build` copies the skills from SKILLS_DIR to `skills/` in the folder of images. That folder is an input of the
image: other skills give another image, and the manifest names each skill with its hash. `find` therefore needs no
setting to recognise the current image. In the guest, the skills belong to root and are read-only.

A build rejects a skill that sessions could not use, so the operator sees the error and not the user of a first turn.
Plain files and hidden entries beside the skills are ignored; every other folder must be a skill. An empty folder means
no skills.
"""

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from hypercore_agents.api.skills import MANIFEST, MAX_FRONTMATTER, fault_in, is_skill_name
from hypercore_agents.compute.microvm.image.commands import remove_tree
from hypercore_agents.compute.microvm.image.errors import ImageError

IN_GUEST = Path("opt/hypercore-agents/skills")
_LARGEST_BYTES = 256 * 2**20
_MOST_FILES = 10_000


def take_skills(source: Path, folder: Path) -> None:
    """Use the skills in `source` for all further images that are built in `folder`. Raises ImageError."""
    try:
        names = _checked(source)
        new, target = folder / ".skills-new", folder / "skills"
        if new.exists():
            remove_tree(new)
        new.mkdir(parents=True)
        for name in names:
            put_skills(source / name, new / name)
        if target.exists():
            remove_tree(target)
        new.rename(target)
    except OSError as error:
        raise ImageError(f"skills cannot be copied from {source}: {error}") from error


def put_skills(source: Path, target: Path) -> None:
    """Copy skills, readable for every user. Links are followed, because their targets are not in the guest."""
    shutil.copytree(source, target)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


def hashes(folder: Path) -> dict[str, str]:
    """Return a hash of each skill in a folder: of its files' names, contents and executable bits.

    Links are followed, as they are by the copy, so a copied skill has the hash of its source. Raises ImageError for
    entries that cannot be copied, and OSError.
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
    """Return the name of the current state of a folder of skills, None if it has no skills."""
    named = [f"{name} {digest}\n" for name, digest in hashes(folder).items()]
    return hashlib.sha256("".join(named).encode()).hexdigest()[:16] if named else None


def _checked(source: Path) -> list[str]:
    """Return the names of the skills in a folder. Raises ImageError for the first invalid one."""
    if not source.is_dir():
        raise ImageError(f"skills: the folder {source} does not exist")
    folders = _folders_of(source)
    size = count = 0
    for skill in folders:
        if not is_skill_name(skill.name):
            raise ImageError(
                f"skills: {skill.name!r} is not a valid name; use a-z, 0-9 and - between them, at most 64 characters"
            )
        for path in _files(skill, ()):
            size, count = size + path.stat().st_size, count + 1
        manifest = skill / MANIFEST
        if not manifest.is_file():
            raise ImageError(f"skills: {skill} is not a skill: it has no {MANIFEST}; add one, or move it elsewhere")
        with manifest.open(encoding="utf-8", errors="replace") as file:
            fault = fault_in(file.read(MAX_FRONTMATTER), skill.name)
        if fault is not None:
            raise ImageError(f"skills: {fault}")
    if size > _LARGEST_BYTES or count > _MOST_FILES:
        raise ImageError(
            f"skills: {source} has {count} files of {size >> 20} MB in total; "
            f"an image takes at most {_MOST_FILES} files and {_LARGEST_BYTES >> 20} MB"
        )
    return [path.name for path in folders]


def _folders_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_file())


def _files(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Yield the files below a folder, following links. Raises ImageError for an entry that cannot be copied."""
    here = folder.stat()
    if (here.st_dev, here.st_ino) in above:
        raise ImageError(f"skills: {folder} is a link to one of its parent folders; remove it")
    with os.scandir(folder) as listing:
        entries = [*listing]
    for entry in entries:
        try:
            mode = entry.stat().st_mode
        except FileNotFoundError:
            raise ImageError(f"skills: {entry.path} is a broken link; repair or remove it") from None
        if stat.S_ISDIR(mode):
            yield from _files(Path(entry.path), (*above, (here.st_dev, here.st_ino)))
        elif stat.S_ISREG(mode):
            yield Path(entry.path)
        else:
            raise ImageError(f"skills: {entry.path} is neither a file nor a folder; remove it")
