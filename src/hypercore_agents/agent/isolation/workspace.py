"""Where a session keeps its files: one folder per session, 0700, removed as a whole.

    <state>/sessions/<session id>/home           HOME
                                  config         CLAUDE_CONFIG_DIR: the transcript is under projects/
                                  workspace      cwd: the user's files
                                  tmp            TMPDIR
                                  system-prompt  the system prompt, in a file so that no command line shows it

The session id is a validated UUID, so it cannot lead out of the state folder.
"""

import asyncio
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass
class SessionFolder:
    """Paths of one stay of a session on an agent. `released`: that is over, and nothing may be done in it any more.

    `user` stands for the session's user where limits are per user; "" while the session has none.
    """

    session_id: str
    root: Path
    released: bool = False
    user: str = ""

    @classmethod
    def of(cls, state: Path, session_id: str) -> "SessionFolder":
        """Return the paths of a session under an agent's state folder."""
        return cls(session_id, state / "sessions" / session_id)

    @property
    def home(self) -> Path:
        """HOME of the session's processes."""
        return self.root / "home"

    @property
    def configuration(self) -> Path:
        """CLAUDE_CONFIG_DIR: the CLI's transcript and settings."""
        return self.root / "config"

    @property
    def workspace(self) -> Path:
        """The user's files; the working directory."""
        return self.root / "workspace"

    @property
    def temporary(self) -> Path:
        """TMPDIR of the session's processes."""
        return self.root / "tmp"

    @property
    def system_prompt(self) -> Path:
        """File with the session's system prompt."""
        return self.root / "system-prompt"

    @property
    def transcript(self) -> str:
        """Where the CLI writes the transcript, below the folder: named by the working directory and the session."""
        key = re.sub(r"[^a-zA-Z0-9]", "-", os.path.realpath(self.workspace))
        return f"config/projects/{key}/{self.session_id}.jsonl"

    def create(self) -> None:
        """Make the folders, 0700. Safe to repeat."""
        for path in (
            self.root.parent,
            self.root,
            self.home,
            self.configuration,
            self.workspace,
            self.temporary,
        ):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def has_transcript(self) -> bool:
        """Say whether the CLI has written this session's transcript, so that a resume will find it."""
        return any(self.configuration.glob(f"projects/*/{self.session_id}.jsonl"))

    async def remove(self) -> None:
        """Remove everything, off the event loop. Files that tools made unreadable do not stop it."""
        await asyncio.to_thread(_remove_tree, self.root)


def _remove_tree(root: Path) -> None:
    def reopen(function: object, path: str, _: object) -> None:
        # a tool may have taken the write permission from a folder of its own
        target = Path(path)
        if not target.exists() and not target.is_symlink():
            return
        target.parent.chmod(0o700)
        if target.is_dir() and not target.is_symlink():
            target.chmod(0o700)
            shutil.rmtree(target, ignore_errors=True)
        else:
            target.unlink(missing_ok=True)

    if root.exists():
        shutil.rmtree(root, onerror=reopen)
