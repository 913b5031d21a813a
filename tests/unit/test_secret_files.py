"""Roles do not start while sessions on this machine can read a file with secrets of the platform."""

from pathlib import Path

import pytest

from hypercore_agents.cli import secret_files
from hypercore_agents.cli.command_errors import CommandError
from hypercore_agents.kit.linux.session_view import readable_in_view
from support.command_line import command


@pytest.fixture
def product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the platform's files, all readable by every user."""
    folder = tmp_path / "shown" / "product"
    (folder / "state").mkdir(parents=True)
    for name in (".env", "state/keys.json"):
        (folder / name).write_text("JWT_SECRET=x\n")
        (folder / name).chmod(0o644)
    for path in (folder, folder / "state"):
        path.chmod(0o755)
    tmp_path.chmod(0o700)  # closed above the part that sessions see: no protection
    monkeypatch.chdir(folder)
    monkeypatch.setenv("STATE_DIR", str(folder / "state"))
    monkeypatch.setenv("EXPOSED_PATHS", f"/usr/bin:{folder.parent}")
    monkeypatch.delenv("COMPUTE_BACKEND", raising=False)
    return folder


def test_each_readable_secret_file_is_reported_with_its_remedy(product: Path) -> None:
    for name, mode, what in (
        (".env", "600", "the settings"),
        ("state/keys.json", "600", "the key ring, KEY_FILE"),
        ("state", "700", "the state folder, STATE_DIR"),
    ):
        with pytest.raises(CommandError) as refused:
            secret_files.check()
        message = str(refused.value)
        assert message.startswith(f"{product / name} ({what}) can be read by every session on this machine"), message
        assert f"it is in {product.parent}, which sessions can read" in message
        remedy = f"chmod {mode} {product / name}"
        assert message.endswith(remedy), message
        (product / name).chmod(int(mode, 8))
    secret_files.check()


def test_other_backends_skip_the_check_of_secret_files(product: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPUTE_BACKEND", "microvm")
    secret_files.check()


@pytest.mark.parametrize("role", ["manager", "gateway", "autoscaler", "up"])
def test_roles_do_not_start_with_readable_secret_files(product: Path, role: str) -> None:
    refused = command(role)
    assert refused.code == 2
    assert f"chmod 600 {product / '.env'}" in refused.err


def test_symlinks_are_resolved_and_closed_folders_protect_files(tmp_path: Path) -> None:
    shown, hidden = tmp_path / "shown", tmp_path / "hidden"
    (shown / "closed").mkdir(parents=True)
    hidden.mkdir()
    for path in (shown / "closed" / "a", hidden / "b"):
        path.write_text("x")
        path.chmod(0o644)
    (shown / "closed").chmod(0o700)
    (hidden / "link").symlink_to(shown)
    shown.chmod(0o755)
    assert readable_in_view(str(hidden / "b"), [str(shown)]) is None
    assert readable_in_view(str(shown / "closed" / "a"), [str(shown)]) is None
    (shown / "closed").chmod(0o711)
    assert readable_in_view(str(shown / "closed" / "a"), [str(shown)]) == str(shown)
    assert readable_in_view(str(shown / "closed" / "a"), [str(hidden / "link")]) == str(hidden / "link")
    assert readable_in_view("/etc/ld.so.cache") == "/etc/ld.so.cache"
    assert readable_in_view("/etc/hostname") is None
