"""Reference vectors in tests/golden: one file holds the settings, weights, inputs and outputs of a small model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open


class GoldenVectors:
    """Groups of a file by name: `weights`, `inputs`, `outputs`; `settings` are its model's."""

    def __init__(self, name: str) -> None:
        path = Path(__file__).parent / "golden" / f"{name}.safetensors"
        groups: dict[str, dict[str, np.ndarray]] = {"weights": {}, "inputs": {}, "outputs": {}}
        with safe_open(path, "numpy") as file:
            self.settings: dict[str, Any] = json.loads(file.metadata()["settings"])
            for key in file.keys():  # noqa: SIM118
                group, _, tensor = key.partition("/")
                groups[group][tensor] = file.get_tensor(key)
        self.weights, self.inputs, self.outputs = groups["weights"], groups["inputs"], groups["outputs"]

    def images(self, name: str = "image") -> np.ndarray:
        """Normalised images [B, H, W, 3], of NCHW inputs."""
        return self.inputs[name].transpose(0, 2, 3, 1)
