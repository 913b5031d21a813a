"""Skills: the operator's folders of instructions, which a session can enable by name and cannot change.

    SKILLS_DIR/NAME/SKILL.md   a frontmatter with `name: NAME` and `description`, then the instructions
               NAME/...        any other files of the skill

They are part of the guest image (`/opt/hypercore-agents/skills`); for agents that are processes, SKILLS_DIR names their
folder. The CLI gets each enabled skill as a separate plugin (`--plugin-dir`) with the name `NAME:NAME`. The SDK's list
of skills excludes all others, including those bundled with the CLI.

So a skill's folder may contain anything that a plugin may (hooks, commands, MCP servers): it belongs to the operator,
like the image. The name in the frontmatter must equal the folder's name, as the format of skills requires; the pinned
CLI uses the former, and silently omits a skill whose names differ.

Rejected: copies in the session's CLAUDE_CONFIG_DIR with the setting source `user`, since then any file that a tool
writes there would configure the CLI, including its hooks.
"""

from collections.abc import Sequence
from pathlib import Path

from claude_agent_sdk import SdkPluginConfig

from hypercore_agents.api.errors import InvalidRequest
from hypercore_agents.api.skills import MANIFEST, MAX_FRONTMATTER, fault_in

SKILL_TOOL = "Skill"


def available(folder: Path) -> list[str]:
    """Return the names of the skills in a folder."""
    try:
        return sorted(entry.name for entry in folder.iterdir() if (entry / MANIFEST).is_file())
    except OSError:
        return []


def check_skills(wanted: Sequence[str], folder: Path) -> None:
    """Reject skills that do not exist or that the CLI would not find. Raises InvalidRequest with the remedy."""
    for name in wanted:
        fault = _fault(folder / name / MANIFEST, name)
        if fault is None:
            continue
        names = ", ".join(available(folder)) or "none"
        raise InvalidRequest(
            f"skills: {fault}; skills of this agent: {names}. The operator adds skills to the image, or to SKILLS_DIR "
            "where agents are processes",
            field="skills",
        )


def plugins_of(enabled: Sequence[str], folder: Path) -> list[SdkPluginConfig]:
    """Return the plugins that make the CLI load the enabled skills."""
    return [SdkPluginConfig(type="local", path=str(folder / name)) for name in enabled]


def names_of(enabled: Sequence[str]) -> list[str]:
    """Return the CLI's names of the enabled skills."""
    return [f"{name}:{name}" for name in enabled]


def reading_rules(enabled: Sequence[str], folder: Path) -> list[str]:
    """Return the permission rules that allow the CLI to read the skills' other files."""
    return [f"Read(/{folder / name}/**)" for name in enabled]


def _fault(manifest: Path, name: str) -> str | None:
    try:
        with manifest.open(encoding="utf-8", errors="replace") as file:
            return fault_in(file.read(MAX_FRONTMATTER), name)
    except (FileNotFoundError, NotADirectoryError):
        return f"the skill {name!r} does not exist"
    except OSError as error:
        return f"the skill {name!r} cannot be read ({error.strerror}); make its folder readable to all users"
