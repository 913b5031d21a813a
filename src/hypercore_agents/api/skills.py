"""The format of a skill, as far as both sides of a sandbox must agree on it: who puts it into an image, who uses it.

A skill is a folder NAME with a `SKILL.md` that begins with a frontmatter, which is YAML between two lines `---`. Its
`name`, if it has one, is NAME: the pinned CLI uses the frontmatter's name, sessions use the folder's, and a skill whose
names differ would silently be absent. Pure.
"""

import re

import yaml
from pydantic import TypeAdapter, ValidationError

from hypercore_agents.api.options import SkillName

MANIFEST = "SKILL.md"
LONGEST_FRONTMATTER = 16 * 1024
"""As much of a manifest is looked at, in characters."""
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
    found = _FRONTMATTER.match(beginning.removeprefix("\ufeff"))
    if found is None:
        return f"the skill {name!r} has no frontmatter: its {MANIFEST} must begin with lines between `---` and `---`"
    try:
        values = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 2}" if mark else ""
        return f"the frontmatter of the skill {name!r} ({MANIFEST}{where}) is not YAML; put texts with `: ` in quotes"
    if not isinstance(values, dict):
        return f"the frontmatter of the skill {name!r} in its {MANIFEST} must be lines of the form `name: value`"
    if str(values.get("name", name)).strip() != name:
        return f"the skill {name!r} has another name in the frontmatter of its {MANIFEST}; it must be `name: {name}`"
    return None
