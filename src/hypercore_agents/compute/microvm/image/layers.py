"""The layers that builds reuse: Debian's packages with the kernel, and the Python requirements.

A layer is a folder `layers/NAME-ID`. It is made under another name and renamed, so a layer that exists is complete.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypercore_agents.compute.microvm.image import inputs
from hypercore_agents.compute.microvm.image.commands import remove_tree, run
from hypercore_agents.compute.microvm.image.errors import ImageError

LIBRARY = Path("usr/local/lib") / f"python{inputs.PYTHON}" / "dist-packages"
"""The guest's folder of Python packages that do not come from Debian."""
_EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/lintian/*")
_SOURCES = ("etc/apt/sources.list.d/debian.sources", "etc/apt/sources.list")
_GLIBC_MINOR = {"bookworm": 36}


@dataclass(frozen=True)
class Base:
    """The base layer: the unpacked root, kernel and modules, and their versions."""

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
        """Return the versions of the installed packages, and the kernel's version and hash."""
        contents: dict[str, object] = json.loads((self.folder / "contents.json").read_text())
        return contents


def base_layer(folder: Path, work: Path, progress: Callable[[str], None], *, refresh: bool) -> Base:
    """Return the base layer; make it if it is missing or `refresh` is set."""
    target = folder / "layers" / f"base-{inputs.base_id()}"
    if target.is_dir() and not refresh:
        return Base(target)
    progress(f"installing Debian {inputs.SUITE}: {len(inputs.PACKAGES)} packages and their dependencies")
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
    # Python checks Debian's compiled files by their time stamps, which the packed root does not preserve.
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
    return Base(_move_into_place(made, target))


# The hook runs the host's apt with the new root's configuration (mmdebstrap(1), HOOKS).
_FETCH_KERNEL = (
    'cd "$1/.." && export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" && '
    'apt-get download -qq -o APT::Sandbox::User=root "$(apt-cache depends {kernel} | sed -n "s/^ *Depends: //p" | head -n 1)"'  # noqa: E501
)


def site_layer(folder: Path, work: Path, base: Base, progress: Callable[[str], None]) -> Path:
    """Return the folder of compiled Python requirements, which an image has at LIBRARY; make it if it is missing."""
    target = folder / "layers" / f"site-{inputs.site_id()}"
    if target.is_dir():
        return target
    progress("installing the locked Python requirements, including the Claude CLI")
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
    progress("compiling the Python requirements")
    root = work / "compile"
    link_tree(base.root, root)
    library = root / LIBRARY
    library.parent.mkdir(parents=True, exist_ok=True)
    made.rename(library)
    compile_python(root, LIBRARY)
    library.rename(made)
    remove_tree(root)
    return _move_into_place(made, target)


def compile_python(root: Path, folder: Path) -> None:
    """Compile Python sources with the guest's Python, which cannot store the result in its read-only root."""
    run(
        ["chroot", root, "/usr/bin/python3", "-I", "-m", "compileall", "-q", "-f", "--invalidation-mode=unchecked-hash",
         f"/{folder}"]
    )  # fmt: skip


def link_tree(source: Path, target: Path) -> None:
    """Copy a tree by hard links, which takes no disk space. Later changes must replace files, not write to them."""
    run(["cp", "--archive", "--link", "--no-target-directory", source, target])


def debian_sources(root: Path, suite: str) -> list[str]:
    """Return the host's list of Debian archives if it has the suite; an empty list selects mmdebstrap's default."""
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


def _move_into_place(made: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        remove_tree(target)
    made.rename(target)
    return target
