"""Builds images from their layers, and prunes old ones.

One build at a time runs per folder (a lock file); a build that waited uses the result of the other. Everything is made
in a folder `.building-*` and renamed into place last, so an interrupted build leaves no partial image, only that
folder, which the next build removes.

The root is packed with lz4: it unpacks several times faster than zstd, and under TCG the guest unpacks slowly. The
files of this package are copied from this installation: a wheel would hold the same files, but would need the build
backend on every host, and an editable installation has no wheel.
Rejected: building on a mounted overlay (not possible on every host); a container image as the base (needs a registry).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypercore_agents
from hypercore_agents.compute.microvm.image import inputs
from hypercore_agents.compute.microvm.image.built_image import FILES, Image
from hypercore_agents.compute.microvm.image.commands import check_host, remove_tree, run
from hypercore_agents.compute.microvm.image.errors import ImageError
from hypercore_agents.compute.microvm.image.images import discard, find, folder_for, listing, listing_in
from hypercore_agents.compute.microvm.image.initramfs import initramfs, read_modules
from hypercore_agents.compute.microvm.image.layers import (
    LIBRARY,
    Base,
    base_layer,
    compile_python,
    link_tree,
    site_layer,
)
from hypercore_agents.compute.microvm.image.skills import IN_GUEST, hashes, put_skills, skills_id, take_skills

RETAINED_IMAGES = 8
"""Images that a build leaves in its folder. Several installations may share the folder, each with its own image."""
_USER = "agent:x:1000:1000:agent:/var/lib/agent:/usr/sbin/nologin\n"
_GROUP = "agent:x:1000:\n"
_SQUASHFS = (
    "-noappend",
    "-comp",
    "lz4",
    "-all-root",
    "-all-time",
    "0",
    "-mkfs-time",
    "0",
    "-no-xattrs",
    "-no-progress",
)
_COMMAND = "#!/usr/bin/python3 -I\nfrom hypercore_agents.cli.main import main\n\nmain()\n"


def build(
    state_dir: Path,
    progress: Callable[[str], None] = lambda _: None,
    *,
    refresh: bool = False,
    skills: Path | None = None,
) -> Image:
    """Return the current image; build it if it is missing. Blocks, for minutes at worst.

    `progress` gets one line per step. `refresh` downloads Debian's packages again, for their security updates. `skills`
    replaces the operator's skills for this and later builds; None leaves them unchanged. Raises ImageError and leaves
    no partial image.
    """
    if not refresh and skills is None:
        image = find(state_dir)
        if image is not None:
            return image
    return _build_in(folder_for(state_dir), progress, refresh=refresh, skills=skills)


def prune(state_dir: Path, *, keep: frozenset[str] = frozenset()) -> list[str]:
    """Remove images that are neither current nor in `keep` (ids in use), and unused layers; return what was removed."""
    current = find(state_dir)
    removed = []
    for image in listing(state_dir):
        if image.image_id in keep or (current is not None and image.image_id == current.image_id):
            continue
        discard(image)
        removed.append(image.image_id)
    return removed + _prune_layers(folder_for(state_dir))


def _build_in(folder: Path, progress: Callable[[str], None], *, refresh: bool, skills: Path | None) -> Image:
    if not folder.is_dir():
        check_host()
    folder.mkdir(parents=True, exist_ok=True)
    with _exclusively(folder, progress):
        if skills is not None:
            take_skills(skills, folder)
        if not refresh:
            wanted = inputs.inputs_id(skills_id(folder / "skills"))
            existing = next((image for image in listing_in(folder) if image.inputs_id == wanted), None)
            if existing is not None:
                return existing
        check_host()
        for leftover in folder.glob(".building-*"):
            remove_tree(leftover)
        work = Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
        try:
            return _build(folder, work, progress, refresh=refresh)
        except OSError as error:
            raise ImageError(f"the image cannot be built: {error}") from error
        finally:
            remove_tree(work)


def _build(folder: Path, work: Path, progress: Callable[[str], None], *, refresh: bool) -> Image:
    base = base_layer(folder, work, progress, refresh=refresh)
    site = site_layer(folder, work, base, progress)
    image = work / "image"
    image.mkdir()
    progress("assembling the root")
    root = work / "root"
    _assemble(base, site, root)
    skills = hashes(folder / "skills")
    if skills:
        progress(f"adding skills: {', '.join(skills)}")
        put_skills(folder / "skills", root / IN_GUEST)
    progress("packing the root")
    run(["mksquashfs", root, image / "root.squashfs", *_SQUASHFS])
    shutil.copyfile(next(base.kernel.glob("boot/vmlinuz-*")), image / "vmlinuz")
    busybox = (base.root / "bin/busybox").read_bytes()
    (image / "initrd").write_bytes(initramfs(busybox, read_modules(base.kernel, inputs.MODULES)))
    (image / "busybox").write_bytes(busybox)
    progress("writing the manifest")
    manifest = _manifest(image, base, skills, skills_id(folder / "skills"))
    (image / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    os.sync()
    target = folder / "images" / str(manifest["image_id"])
    target.parent.mkdir(exist_ok=True)
    if target.exists():  # a refresh that found no newer packages
        remove_tree(target)
    image.rename(target)
    for older in listing_in(folder)[RETAINED_IMAGES:]:
        discard(older)
    progress(f"image {manifest['image_id']} is ready")
    return Image(target, manifest["image_id"], manifest["inputs_id"], manifest["created_at"])


def _assemble(base: Base, site: Path, root: Path) -> None:
    link_tree(base.root, root)
    library = root / LIBRARY
    library.parent.mkdir(parents=True, exist_ok=True)
    if library.exists():
        library.rmdir()  # Debian creates it empty
    link_tree(site, library)
    package = library / "hypercore_agents"
    source = Path(hypercore_agents.__file__).parent
    for name in inputs.source_files():
        target = package / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target)
    compile_python(root, LIBRARY / "hypercore_agents")
    command = root / "usr/local/bin/hypercore-agents"
    command.write_text(_COMMAND)
    command.chmod(0o755)
    # Execute-only, as the launcher requires: the tools of a session can then neither read nor change the running CLI.
    (library / "claude_agent_sdk/_bundled/claude").chmod(0o711)
    claude = root / "usr/local/bin/claude"
    claude.symlink_to(Path("/") / LIBRARY / "claude_agent_sdk/_bundled/claude")
    for mount_point in ("var/lib/agent", "run", "tmp", "var/tmp"):
        (root / mount_point).mkdir(parents=True, exist_ok=True)
    # Hard links are shared with the layer, so files are replaced and never written in place.
    _replace(root / "etc/passwd", _USER)
    _replace(root / "etc/group", _GROUP)
    for unwanted in ("etc/resolv.conf", "etc/hostname", "etc/machine-id", "etc/hosts"):
        (root / unwanted).unlink(missing_ok=True)
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    for path in _privileged(root):
        mode = path.stat().st_mode & 0o777
        copy = path.with_name(path.name + ".plain")
        shutil.copyfile(path, copy)
        copy.chmod(mode)
        copy.replace(path)


def _replace(path: Path, more: str) -> None:
    content = path.read_text() + more
    path.unlink()
    path.write_text(content)


def _privileged(root: Path) -> Iterator[Path]:
    """Yield set-uid and set-gid programs, which a guest does not need."""
    for path in [*(root / "usr").rglob("*")]:
        if not path.is_symlink() and path.is_file() and path.stat().st_mode & 0o6000:
            yield path


def _manifest(image: Path, base: Base, skills: dict[str, str], skills_name: str | None) -> dict[str, Any]:
    contents = base.contents()
    inputs_name = inputs.inputs_id(skills_name)
    content = json.dumps([inputs_name, contents], sort_keys=True).encode()
    files = {}
    for name in FILES:
        with (image / name).open("rb") as file:
            files[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "image_id": hashlib.sha256(content).hexdigest()[:16],
        "inputs_id": inputs_name,
        "created_at": time.time(),
        "recipe": inputs.RECIPE,
        "suite": inputs.SUITE,
        "layers": {"base": inputs.base_id(), "site": inputs.site_id(), "package": inputs.package_id()},
        "requirements_sha256": hashlib.sha256(inputs.lock_file().read_bytes()).hexdigest(),
        "version": hypercore_agents.__version__,
        "modules": inputs.MODULES,
        "skills": skills,
        **contents,
        "files": files,
    }


@contextlib.contextmanager
def _exclusively(folder: Path, progress: Callable[[str], None]) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another build to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _prune_layers(folder: Path) -> list[str]:
    """Remove layers that the current image does not use, and leftovers of interrupted builds; return their names."""
    if not folder.is_dir():
        return []
    wanted = {f"base-{inputs.base_id()}", f"site-{inputs.site_id()}"}
    removed = []
    with _exclusively(folder, lambda _: None):
        for path in [*folder.glob("layers/*"), *folder.glob(".building-*")]:
            if path.name not in wanted:
                remove_tree(path)
                removed.append(path.name)
    return removed
