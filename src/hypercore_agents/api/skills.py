"""The format of a skill, as far as both sides of a sandbox must agree on it: who puts it into an image, who uses it.

A skill is a folder NAME with a `SKILL.md` that begins with a frontmatter whose `name` is NAME: the pinned CLI goes by
the frontmatter, sessions go by the folder, and a skill whose names differ would silently not be there. Pure.
"""

import re

from pydantic import TypeAdapter, ValidationError

from hypercore_agents.api.options import SkillName

MANIFEST = "SKILL.md"
LONGEST_FRONTMATTER = 16 * 1024
"""As much of a manifest is looked at, in characters."""
_NAME = re.compile(r"^name:[ \t]*[\"']?([^\"'\r\n]*?)[\"']?[ \t]*$", re.MULTILINE)
_FRONTMATTER = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


def is_skill_name(name: str) -> bool:
    """Say whether a session could ask for a skill of this name."""
    try:
        TypeAdapter(SkillName).validate_python(name)
    except ValidationError:
        return False
    return True


def fault_in(beginning: str, name: str) -> str | None:
    """Return what is wrong with the beginning of the manifest of the skill `name`, None when nothing is."""
    frontmatter = _FRONTMATTER.match(beginning)
    named = _NAME.search(frontmatter[1]) if frontmatter else None
    if named is None or named[1] != name:
        return f"the skill {name!r} has another name in the frontmatter of its {MANIFEST}; it must be `name: {name}`"
    return None
