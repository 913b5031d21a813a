"""The format of a skill, shared by the program that puts skills into an image and the agent that uses them. Pure.

A skill is a folder NAME with a `SKILL.md` that begins with frontmatter: YAML between two lines `---`. Its `name`, if
present, must be NAME. The pinned CLI uses the name in the frontmatter and sessions use the folder's, so a skill whose
names differ would be missing without an error.
"""

import re

import yaml
from pydantic import TypeAdapter, ValidationError

from hypercore_agents.api.options import SkillName

MANIFEST = "SKILL.md"
MAX_FRONTMATTER = 16 * 1024
"""Only this much of a manifest is read, in characters."""
_FRONTMATTER = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


def is_skill_name(name: str) -> bool:
    """Return whether this is a valid name of a skill."""
    try:
        TypeAdapter(SkillName).validate_python(name)
    except ValidationError:
        return False
    return True


def fault_in(beginning: str, name: str) -> str | None:
    """Return what is wrong with the beginning of the manifest of the skill `name`, None if it is valid."""
    found = _FRONTMATTER.match(beginning.removeprefix("\ufeff"))
    if found is None:
        return f"the skill {name!r} has no frontmatter: its {MANIFEST} must begin with lines between `---` and `---`"
    try:
        values = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 2}" if mark else ""
        return f"the frontmatter of the skill {name!r} ({MANIFEST}{where}) is not YAML; quote values that contain `: `"
    if not isinstance(values, dict):
        return f"the frontmatter of the skill {name!r} in its {MANIFEST} must consist of lines `name: value`"
    if str(values.get("name", name)).strip() != name:
        return (
            f"the skill {name!r} has a different name in the frontmatter of its {MANIFEST}; it must be `name: {name}`"
        )
    return None
