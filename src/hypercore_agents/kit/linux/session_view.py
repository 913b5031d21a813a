"""What of a host's file system every session can read, by name, and which of the host's files that includes.

Named files and folders that programs need, never `/etc` or `/opt` as a whole: what an operator puts there (a product
with its `.env`, a database's password) is not a session's. The launcher builds the view from this list; roles ask
`readable_in_view` whether a file that holds a secret is in it. Standard library only: the launcher imports it.
"""

from __future__ import annotations

import glob
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
"""Folders that a session sees as a whole: the distribution's programs and libraries."""

ETC = (
    "ImageMagick-*", "R", "alternatives", "bash.bashrc", "bash_completion", "bashrc", "crypto-policies",
    "debian_version", "ethertypes", "fonts", "gai.conf", "host.conf", "inputrc", "java", "java-*", "ld.so.cache",
    "ld.so.conf", "ld.so.conf.d", "locale.alias", "locale.conf", "localtime", "login.defs", "lsb-release", "magic",
    "magic.mime", "mailcap", "mime.types", "nanorc", "networks", "os-release", "perl", "pki/ca-trust/extracted",
    "pki/tls/cert.pem", "pki/tls/certs", "pki/tls/openssl.cnf", "profile", "protocols", "python3", "python3.*",
    "redhat-release", "rpc", "services", "shells", "ssl/cert.pem", "ssl/certs", "ssl/openssl.cnf", "terminfo", "texmf",
    "timezone", "vim",
)  # fmt: skip
"""What a session sees of the host's `/etc`, where it is there (glob(7)). Users, groups, hosts are made for it."""

ETC_OF_SERVER = ("hosts", "nsswitch.conf", "resolv.conf")
"""What the agent server sees besides: with it, names are looked up as on the host."""


def etc_paths(names: Iterable[str] = ETC) -> list[str]:
    """Return the paths below `/etc` that these names mean on this host."""
    return sorted({path for name in names for path in glob.glob(f"/etc/{name}")})


NEVER_EXPOSED = frozenset(
    {"/", "/agent", "/dev", "/etc", "/home", "/proc", "/root", "/run", "/session", "/sys", "/tmp", "/var"}  # noqa: S108
)
"""What cannot be shown to sessions as a whole: it holds the host's secrets, or the view has its own."""


def readable_in_view(path: str, exposed: Iterable[str] = ()) -> str | None:
    """Return the part of the view by which sessions can read a file of the host, None when they cannot.

    `exposed` are the paths that the operator shows to sessions besides the system's. Links are followed. A session owns
    nothing of the host's and is in none of its groups, so it reads what every user may; folders above the part are not
    in the view, so their modes protect nothing. Access control lists are not looked at.
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
