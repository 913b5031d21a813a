"""The layers of an image that are kept between builds: Debian's packages with the kernel, and Python's requirements.

A layer is a folder `layers/NAME-ID` that is complete when it exists: it is made under another name and renamed.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypercore_agents.compute.microvm.image import inputs
from hypercore_agents.compute.microvm.image.commands import remove_tree, run
from hypercore_agents.compute.microvm.image.images import ImageError

LIBRARY = Path("usr/local/lib") / f"python{inputs.PYTHON}" / "dist-packages"
"""Where the guest's Python finds what is not Debian's."""
_EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/lintian/*")
_SOURCES = ("etc/apt/sources.list.d/debian.sources", "etc/apt/sources.list")
_GLIBC_MINOR = {"bookworm": 36}


@dataclass(frozen=True)
class Base:
    """Debian's part: the unpacked root, kernel and modules, and which versions they are."""

    folder: Path

    @property
    def root(self) -> Path:
        """The unpacked packages."""
        return self.folder / "root"

    @property
    def kernel(self) -> Path:
        """The unpacked kernel package."""
        return self.folder / "kernel"

    def contents(self) -> dict[str, object]:
        """Return what was installed: versions of packages, the kernel's version and hash."""
        contents: dict[str, object] = json.loads((self.folder / "contents.json").read_text())
        return contents


def base_layer(folder: Path, work: Path, progress: Callable[[str], None], *, refresh: bool) -> Base:
    """Return the base layer, making it when it is absent or to be refreshed."""
    place = folder / "layers" / f"base-{inputs.base_id()}"
    if place.is_dir() and not refresh:
        return Base(place)
    progress(f"installing Debian {inputs.SUITE}: {len(inputs.PACKAGES)} packages and what they need")
    made = work / "base"
    made.mkdir()
    base = Base(made)
    run(
        [
            "mmdebstrap",
            "--mode=root",
            "--variant=minbase",
            "--format=directory",
            f"--include={','.join(inputs.PACKAGES)}",
            '--aptopt=Acquire::Languages "none"',
            *(f"--dpkgopt=path-exclude={pattern}" for pattern in _EXCLUDED),
            f"--customize-hook={_FETCH_KERNEL.format(kernel=inputs.KERNEL)}",
            inputs.SUITE,
            base.root,
            *debian_sources(Path("/"), inputs.SUITE),
        ],
        confined=True,
        cwd=made,
    )
    # Debian's own compiled files are checked by time stamps, which the packed root does not keep
    compile_python(base.root, Path(f"usr/lib/python{inputs.PYTHON}"))
    progress("unpacking the kernel")
    package = next(made.glob("linux-image-*.deb"))
    run(["dpkg-deb", "-x", package, base.kernel])
    contents = {
        "packages": _installed(base.root / "var/lib/dpkg/status"),
        "kernel": package.name.removesuffix(".deb"),
        "kernel_sha256": hashlib.sha256(package.read_bytes()).hexdigest(),
    }
    package.unlink()
    (made / "contents.json").write_text(json.dumps(contents, indent=1, sort_keys=True))
    return Base(_settle(made, place))


# apt inside the hook is the host's, with the new root's configuration (mmdebstrap(1), HOOKS)
_FETCH_KERNEL = (
    'cd "$1/.." && export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" && '
    'apt-get download -qq -o APT::Sandbox::User=root "$(apt-cache depends {kernel} | sed -n "s/^ *Depends: //p" | head -n 1)"'  # noqa: E501
)


def site_layer(folder: Path, work: Path, base: Base, progress: Callable[[str], None]) -> Path:
    """Return the folder with the locked Python requirements, compiled; it belongs at LIBRARY."""
    place = folder / "layers" / f"site-{inputs.site_id()}"
    if place.is_dir():
        return place
    progress("installing the locked Python requirements, the Claude CLI among them")
    made = work / "site"
    newest = _GLIBC_MINOR[inputs.SUITE]
    platforms = ["manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in range(17, newest + 1))]
    run(
        [
            sys.executable,
            *("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", "--no-deps"),
            *("--require-hashes", "--only-binary=:all:", "--implementation", "cp", "--python-version", inputs.PYTHON),
            *(word for platform in platforms for word in ("--platform", platform)),
            *("--target", made, "-r", inputs.lock_file()),
        ]
    )
    progress("compiling them")
    root = work / "compile"
    link_tree(base.root, root)
    target = root / LIBRARY
    target.parent.mkdir(parents=True, exist_ok=True)
    made.rename(target)
    compile_python(root, LIBRARY)
    target.rename(made)
    remove_tree(root)
    return _settle(made, place)


def compile_python(root: Path, folder: Path) -> None:
    """Compile Python sources with the guest's own Python; its read-only root could not keep the result."""
    run(
        ["chroot", root, "/usr/bin/python3", "-I", "-m", "compileall", "-q", "-f", "--invalidation-mode=unchecked-hash",
         f"/{folder}"]
    )  # fmt: skip


def link_tree(source: Path, target: Path) -> None:
    """Copy a tree by hard links: at once, and nothing more on disk. What is written afterwards must be new files."""
    run(["cp", "--archive", "--link", "--no-target-directory", source, target])


def debian_sources(root: Path, suite: str) -> list[str]:
    """Return the host's own list of Debian archives, when it serves that suite; nothing means mmdebstrap's default."""
    for name in _SOURCES:
        path = root / name
        if path.is_file() and suite in path.read_text(errors="replace").split():
            return [str(path)]
    return []


def _installed(status: Path) -> dict[str, str]:
    packages = {}
    for paragraph in status.read_text(errors="replace").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
        if "Package" in fields:
            packages[fields["Package"]] = fields.get("Version", "")
    if not packages:
        raise ImageError("the new root has no list of installed packages")
    return packages


def _settle(made: Path, place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        remove_tree(place)
    made.rename(place)
    return place
