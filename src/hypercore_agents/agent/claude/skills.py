"""Skills: folders of the operator's that a session may enable by name and cannot change.

    SKILLS_DIR/NAME/SKILL.md   first a frontmatter with `name: NAME` and `description`, then what to do
               NAME/...        whatever else the skill needs

They are part of the image (`/opt/hypercore-agents/skills`), or lie where the operator says for agents that are
processes. Each enabled one is given to the CLI as a plugin of its own (`--plugin-dir`), under the name `NAME:NAME`, and
the SDK's list of skills keeps all others away, those that the CLI brings along too.

So a skill's folder may hold what else a plugin may (hooks, commands, MCP servers): it is the operator's, like the
image. Rejected: copies in the session's CLAUDE_CONFIG_DIR, which the setting source `user` would find: then whatever a
tool writes there would configure the CLI, hooks among it. The frontmatter's name must be the folder's (as the format of
skills wants it): the pinned CLI goes by the former, and a skill whose names differ would silently not be there.
"""

from collections.abc import Sequence
from pathlib import Path

from claude_agent_sdk import SdkPluginConfig

from hypercore_agents.api.errors import InvalidRequest
from hypercore_agents.api.skills import LONGEST_FRONTMATTER, MANIFEST, fault_in

SKILL_TOOL = "Skill"


def available(folder: Path) -> list[str]:
    """Return the names of the skills that are there."""
    try:
        return sorted(entry.name for entry in folder.iterdir() if (entry / MANIFEST).is_file())
    except OSError:
        return []


def check_skills(wanted: Sequence[str], folder: Path) -> None:
    """Refuse skills that are not there or that the CLI would not find. Raises InvalidRequest with what to do."""
    for name in wanted:
        fault = _fault(folder / name / MANIFEST, name)
        if fault is None:
            continue
        there = ", ".join(available(folder)) or "none"
        raise InvalidRequest(
            f"skills: {fault}; skills of this agent: {there}. The operator puts them into the image, or into "
            "SKILLS_DIR where agents are processes",
            field="skills",
        )


def plugins_of(enabled: Sequence[str], folder: Path) -> list[SdkPluginConfig]:
    """Return what makes the CLI load the enabled skills."""
    return [SdkPluginConfig(type="local", path=str(folder / name)) for name in enabled]


def names_of(enabled: Sequence[str]) -> list[str]:
    """Return the enabled skills as the CLI calls them."""
    return [f"{name}:{name}" for name in enabled]


def reading_rules(enabled: Sequence[str], folder: Path) -> list[str]:
    """Return the permission rules without which a skill's other files could not be read."""
    return [f"Read(/{folder / name}/**)" for name in enabled]


def _fault(manifest: Path, name: str) -> str | None:
    try:
        with manifest.open(encoding="utf-8", errors="replace") as file:
            return fault_in(file.read(LONGEST_FRONTMATTER), name)
    except (FileNotFoundError, NotADirectoryError):
        return f"there is no skill {name!r} here"
    except OSError as error:
        return f"the skill {name!r} cannot be read ({error.strerror}); make its folder readable to everybody"
