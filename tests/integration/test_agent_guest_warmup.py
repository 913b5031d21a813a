"""After the rehearsal an agent's server has nothing left to build: a clone would pay for it by itself."""

import json
import subprocess
import sys

LIVES = """
import json, sys
from pydantic._internal._generate_schema import GenerateSchema
from hypercore_agents.agent.guest.warmup import rehearse
from hypercore_agents.agent.guest.standby import warm_up

schemas = []
generate = GenerateSchema.generate_schema
GenerateSchema.generate_schema = lambda self, found: (schemas.append(str(found)), generate(self, found))[1]
application = warm_up()
for _ in range(2):
    modules = set(sys.modules)
    schemas.clear()
    rehearse(application)
    print(json.dumps({"schemas": schemas, "modules": sorted(set(sys.modules) - modules)}))
"""


def test_a_life_after_the_rehearsal_imports_nothing_and_builds_no_model() -> None:
    done = subprocess.run([sys.executable, "-c", LIVES], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first["schemas"]  # the control: requests build models, once
    assert second == {"schemas": [], "modules": []}
