"""The folder of one session on an agent: its paths, its creation with mode 0700, and its removal as a whole.

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
    """Paths of a session during its placement on an agent.

    `released`: the session has left the agent, and the folder must not be used any more. `user` names the session's
    user where limits are per user; "" while the session has none.
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
        """Path of the CLI's transcript below the folder, made of the working directory and the session id."""
        key = re.sub(r"[^a-zA-Z0-9]", "-", os.path.realpath(self.workspace))
        return f"config/projects/{key}/{self.session_id}.jsonl"

    def create(self) -> None:
        """Create the folders with mode 0700. Idempotent."""
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
        """Return whether the CLI has written this session's transcript, which a resume needs."""
        return any(self.configuration.glob(f"projects/*/{self.session_id}.jsonl"))

    async def remove(self) -> None:
        """Remove everything, off the event loop, including files that tools made unreadable."""
        await asyncio.to_thread(_remove_tree, self.root)


def _remove_tree(root: Path) -> None:
    def reopen(function: object, path: str, _: object) -> None:
        # A tool may have removed the write permission of a folder.
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
