"""After the warm-up an agent's server has nothing left to build; otherwise each clone would pay for it."""

import json
import subprocess
import sys

WARM_UPS = """
import json, sys
from pydantic._internal._generate_schema import GenerateSchema
from hypercore_agents.agent.guest.standby import load_application
from hypercore_agents.agent.guest.warmup import warm_up

schemas = []
generate = GenerateSchema.generate_schema
GenerateSchema.generate_schema = lambda self, found: (schemas.append(str(found)), generate(self, found))[1]
application = load_application()
for _ in range(2):
    modules = set(sys.modules)
    schemas.clear()
    warm_up(application)
    print(json.dumps({"schemas": schemas, "modules": sorted(set(sys.modules) - modules)}))
"""


def test_a_run_after_the_warm_up_imports_no_module_and_builds_no_model() -> None:
    done = subprocess.run([sys.executable, "-c", WARM_UPS], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first["schemas"]  # the control: the first run builds models
    assert second == {"schemas": [], "modules": []}
