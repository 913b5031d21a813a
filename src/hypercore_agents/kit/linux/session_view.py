"""The parts of a host's file system that sessions can read, by name, and whether a given file is among them.

The lists name files and folders that programs need, never `/etc` or `/opt` as a whole, because operators store secrets
there (a product's `.env`, a database password). The launcher builds the view of a session from these lists; roles call
`readable_in_view` to check that files with secrets are outside of it. Standard library only, because the launcher
imports it.
"""

from __future__ import annotations

import glob
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
"""Folders that are completely visible: the distribution's programs and libraries."""

ETC = (
    "ImageMagick-*", "R", "alternatives", "bash.bashrc", "bash_completion", "bashrc", "crypto-policies",
    "debian_version", "ethertypes", "fonts", "gai.conf", "host.conf", "inputrc", "java", "java-*", "ld.so.cache",
    "ld.so.conf", "ld.so.conf.d", "locale.alias", "locale.conf", "localtime", "login.defs", "lsb-release", "magic",
    "magic.mime", "mailcap", "mime.types", "nanorc", "networks", "os-release", "perl", "pki/ca-trust/extracted",
    "pki/tls/cert.pem", "pki/tls/certs", "pki/tls/openssl.cnf", "profile", "protocols", "python3", "python3.*",
    "redhat-release", "rpc", "services", "shells", "ssl/cert.pem", "ssl/certs", "ssl/openssl.cnf", "terminfo", "texmf",
    "timezone", "vim",
)  # fmt: skip
"""The visible parts of `/etc`, if they exist (glob(7)). Users, groups and hosts are created for each session."""

ETC_OF_SERVER = ("hosts", "nsswitch.conf", "resolv.conf")
"""Further files for the agent server, which resolves names as the host does."""


def etc_paths(names: Iterable[str] = ETC) -> list[str]:
    """Return the paths below `/etc` that match these names on this host."""
    return sorted({path for name in names for path in glob.glob(f"/etc/{name}")})


NEVER_EXPOSED = frozenset(
    {"/", "/agent", "/dev", "/etc", "/home", "/proc", "/root", "/run", "/session", "/sys", "/tmp", "/var"}  # noqa: S108
)
"""Paths that cannot be exposed as a whole: they contain secrets of the host, or the view has its own version."""


def readable_in_view(path: str, exposed: Iterable[str] = ()) -> str | None:
    """Return the part of the view in which sessions can read a file of the host, None if they cannot.

    `exposed` are the additional paths that the operator exposes. Links are followed. A session owns no files of the
    host and is in none of its groups, so the permissions for others apply. Folders above the part are not in the view,
    so their modes do not protect the file. Access control lists are ignored.
    """
    real = os.path.realpath(path)
    for part in (*SYSTEM, *etc_paths(), *exposed):
        above = os.path.realpath(part)
        if (real == above or real.startswith(f"{above.rstrip('/')}/")) and _open_to_all(above, real):
            return part
    return None


def _open_to_all(above: str, path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
        while path != above:
            path = os.path.dirname(path)
            if not os.stat(path).st_mode & stat.S_IXOTH:
                return False
    except OSError:
        return False
    return bool(mode & (stat.S_IROTH | stat.S_IXOTH if stat.S_ISDIR(mode) else stat.S_IROTH))
