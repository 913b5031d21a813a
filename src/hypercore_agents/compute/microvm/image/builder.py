"""Building an image from its layers.

One build at a time per folder (a lock file); who waited finds what the other built. Everything is made below a folder
`.building-*` and renamed into place last, so that an interrupted build leaves no half image, only that folder, which
the next build removes.

The root is packed with lz4: it unpacks several times faster than zstd, and under TCG the guest's cores unpack slowly.
This package's files are copied from this installation as they are: a wheel would hold the same files, would need the
build backend on every host, and an installation in place has none.
Rejected: building on a mounted overlay (not possible on every host), a container image as the base (needs a registry).
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
from hypercore_agents.compute.microvm.image.commands import check_host, remove_tree, run
from hypercore_agents.compute.microvm.image.images import FILES, Image, ImageError, discard, listing_in
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

KEPT = 8
"""Images that a build leaves in its folder: several installations may share it, each with an image of its own."""
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


def build_image(
    folder: Path, progress: Callable[[str], None], *, refresh: bool = False, skills: Path | None = None
) -> Image:
    """Build the current image in `folder`, with the skills in `skills` from now on. Raises ImageError."""
    if not folder.is_dir():
        check_host()
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, progress):
        if skills is not None:
            take_skills(skills, folder)
        if not refresh:
            wanted = inputs.inputs_id(skills_id(folder / "skills"))
            existing = next((image for image in listing_in(folder) if image.inputs_id == wanted), None)
            if existing is not None:
                return existing
        check_host()
        for left in folder.glob(".building-*"):
            remove_tree(left)
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
    progress("putting the root together")
    root = work / "root"
    _assemble(base, site, root)
    skills = hashes(folder / "skills")
    if skills:
        progress(f"putting in skills: {', '.join(skills)}")
        put_skills(folder / "skills", root / IN_GUEST)
    progress("packing the root")
    run(["mksquashfs", root, image / "root.squashfs", *_SQUASHFS])
    shutil.copyfile(next(base.kernel.glob("boot/vmlinuz-*")), image / "vmlinuz")
    busybox = (base.root / "bin/busybox").read_bytes()
    (image / "initrd").write_bytes(initramfs(busybox, read_modules(base.kernel, inputs.MODULES)))
    (image / "busybox").write_bytes(busybox)
    progress("taking down what it was made of")
    manifest = _manifest(image, base, skills, skills_id(folder / "skills"))
    (image / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    os.sync()
    place = folder / "images" / str(manifest["image_id"])
    place.parent.mkdir(exist_ok=True)
    if place.exists():  # refreshed, and Debian had nothing new
        remove_tree(place)
    image.rename(place)
    for older in listing_in(folder)[KEPT:]:
        discard(older)
    progress(f"image {manifest['image_id']} is ready")
    return Image(place, manifest["image_id"], manifest["inputs_id"], manifest["created_at"])


def _assemble(base: Base, site: Path, root: Path) -> None:
    link_tree(base.root, root)
    library = root / LIBRARY
    library.parent.mkdir(parents=True, exist_ok=True)
    if library.exists():
        library.rmdir()  # Debian makes it, empty
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
    # Execute-only, as the launcher wants it: a tool of a session cannot read or change the running CLI then.
    (library / "claude_agent_sdk/_bundled/claude").chmod(0o711)
    claude = root / "usr/local/bin/claude"
    claude.symlink_to(Path("/") / LIBRARY / "claude_agent_sdk/_bundled/claude")
    for mount_point in ("var/lib/agent", "run", "tmp", "var/tmp"):
        (root / mount_point).mkdir(parents=True, exist_ok=True)
    # hard links are shared with the layer: replace, never write in place
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
    """Yield programs that run as somebody else (set-uid, set-gid): nobody in a guest has a use for them."""
    for path in [*(root / "usr").rglob("*")]:
        if not path.is_symlink() and path.is_file() and path.stat().st_mode & 0o6000:
            yield path


def _manifest(image: Path, base: Base, skills: dict[str, str], named_skills: str | None) -> dict[str, Any]:
    contents = base.contents()
    known = inputs.inputs_id(named_skills)
    named = json.dumps([known, contents], sort_keys=True).encode()
    files = {}
    for name in FILES:
        with (image / name).open("rb") as file:
            files[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "image_id": hashlib.sha256(named).hexdigest()[:16],
        "inputs_id": known,
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
def _alone(folder: Path, progress: Callable[[str], None]) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another build to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prune_layers(folder: Path) -> list[str]:
    """Remove layers that the current image does not need, and what interrupted builds left; say which."""
    if not folder.is_dir():
        return []
    wanted = {f"base-{inputs.base_id()}", f"site-{inputs.site_id()}"}
    removed = []
    with _alone(folder, lambda _: None):
        for path in [*folder.glob("layers/*"), *folder.glob(".building-*")]:
            if path.name not in wanted:
                remove_tree(path)
                removed.append(path.name)
    return removed
