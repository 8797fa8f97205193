"""The README's table of recipes and the table of methods, against the configs and the code."""

import re
from pathlib import Path

from vlm_jax.config import load_config
from vlm_jax.objectives.base import ObjectiveConfig

ROOT = Path(__file__).parent.parent
CONFIGS = {path.name for path in ROOT.glob("configs/*.py")}


def rows(document: str, title: str) -> list[list[str]]:
    """Cells of the table whose header begins with `title`."""
    table = (ROOT / document).read_text(encoding="utf-8").partition(f"| {title} |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def recipes(cell: str) -> list[str]:
    """References such as `x.py:smoke` that a cell names; a variant alone belongs to the file before it."""
    found: list[str] = []
    for name in re.findall(r"`([^`]*)`", cell):
        found.append(name if not name.startswith(":") else found[-1].partition(":")[0] + name)
    return found


def test_every_config_stands_in_the_readme_with_its_global_batch() -> None:
    named = set()
    for cells in rows("README.md", "config"):
        for reference in recipes(cells[0]):
            pattern, _, variant = reference.partition(":")
            files = [path.name for path in ROOT.glob(f"configs/{pattern}")]
            assert files, reference
            named.update(files)
            for name in files:
                config = load_config(f"{ROOT}/configs/{name}" + (f":{variant}" if variant else ""))
                assert cells[2] in ("", str(config.data.batch_size)), reference
    assert named == CONFIGS


def test_every_method_stands_in_its_page_with_its_files_and_recipes() -> None:
    kinds = ObjectiveConfig.kinds()
    table = rows("docs/objectives.md", "kind")
    assert {cells[0].strip("`") for cells in table} == kinds.keys()
    named = set()
    for kind, _, model, configs in table:
        kind = kind.strip("`")
        assert kinds[kind].__module__ == f"vlm_jax.objectives.{kind}"
        assert all((ROOT / "vlm_jax" / "models" / name).is_file() for name in recipes(model)), model
        for pattern in recipes(configs):
            pattern, _, variant = pattern.partition(":")
            files = sorted(ROOT.glob(f"configs/{pattern}"))
            assert files, pattern
            named.update(path.name for path in files)
            for path in files:
                config = load_config(f"{path}" + (f":{variant}" if variant else ""))
                assert type(config.objective) is kinds[kind], (kind, path)
    assert named == CONFIGS
