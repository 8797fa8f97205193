"""Plans made before, in a file of JSON lines: a search or a table that was stopped goes on where it was.

A plan is found again only for the same config, topology, compiler and sources.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax

import vlm_jax
from vlm_jax.config import Config, to_json
from vlm_jax.plan.topologies import Topology
from vlm_jax.platforms import libtpu_version


class PlanCache:
    """See above.

    Args:
        path: of the file; it need not exist.
    """

    def __init__(self, path: Path):
        self._path = path
        self._plans: dict[str, dict[str, Any]] = {}
        self._compiler = (jax.__version__, libtpu_version(), _sources_digest())
        if path.exists():
            for line in filter(None, path.read_text().splitlines()):
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # half a line, of a command that was killed
                self._plans[entry["key"]] = entry["plan"]

    def key(self, config: Config, topology: Topology) -> str:
        """What a plan depends on, as a digest."""
        text = json.dumps([to_json(config), str(topology), self._compiler], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, config: Config, topology: Topology) -> dict[str, Any] | None:
        """The plan as JSON, or None if it was never made."""
        return self._plans.get(self.key(config, topology))

    def put(self, config: Config, topology: Topology, plan: dict[str, Any]) -> None:
        """Appends a plan to the file."""
        key = self.key(config, topology)
        self._plans[key] = plan
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            # a line break before it too: what stands there may be half a line
            file.write("\n" + json.dumps({"key": key, "plan": plan}) + "\n")


def _sources_digest() -> str:
    """Of every Python file of the package: a changed model or step is another program."""
    root, digest = Path(vlm_jax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
