"""LLaVA's projector and PEFT's adapters as files: in and out with the same bits, onto what, and what is refused.

Whether an adapter means here what it means to PEFT is asked in test_llava_golden.py and test_vision_language_parity.py.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from golden_vectors import GoldenVectors
from safetensors.numpy import load_file, save_file

from vlm_jax.interop.__main__ import main
from vlm_jax.loading import load
from vlm_jax.main import main as train

GOLDEN = GoldenVectors("llava_model")
ADAPTER = {name.removeprefix("lora."): x for name, x in GOLDEN.inputs.items() if name.startswith("lora.")}
SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": ["q_proj"]}
PROJECTOR = {name: x + 1 for name, x in GOLDEN.weights.items() if "mm_projector" in name}


def written(folder: Path, tensors: Any = ADAPTER, **settings: Any) -> Path:
    """A release of LLaVA's authors: an adapter with the projector beside it, as they name both."""
    folder.mkdir()
    trained = {f"base_model.model.{name}": x for name, x in PROJECTOR.items()}
    save_file(trained, folder / "non_lora_trainables.safetensors")
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a base and the same with adapter and projector."""
    root = tmp_path_factory.mktemp("adapters")
    (root / "files").mkdir()
    save_file(GOLDEN.weights, root / "files" / "model.safetensors")
    (root / "files" / "config.json").write_text(json.dumps(GOLDEN.settings))
    assert main(["import", f"--from={root}/files", f"--to={root}/base"]) == 0
    written(root / "release")
    assert main(["import", f"--from={root}/release", f"--base={root}/base", f"--to={root}/both"]) == 0
    return root


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].tobytes() == tensor.tobytes(), name


def test_an_adapter_comes_back_bit_for_bit(root: Path, tmp_path: Path) -> None:
    assert main(["export", f"--from={root}/both", f"--to={tmp_path}", "--family=official", "--part=adapter"]) == 0
    # A saved file leaves out the name of the adapter, which is in memory alone.
    same(
        load_file(tmp_path / "adapter_model.safetensors"),
        {name.replace(".default.", "."): x for name, x in ADAPTER.items()},
    )
    same(
        load_file(tmp_path / "non_lora_trainables.safetensors"),
        {f"base_model.model.{name}": x for name, x in PROJECTOR.items()},
    )
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {key: settings[key] for key in SETTINGS if key != "target_modules"} == {
        key: value for key, value in SETTINGS.items() if key != "target_modules"
    }
    assert settings["target_modules"] == [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]
    both = load(root / "both")
    assert both.config.data.chat == load(root / "base").config.data.chat
    tiny.assert_trees_equal(both.params["image"], load(root / "base").params["image"])


def test_the_names_of_transformers_modules(root: Path, tmp_path: Path) -> None:
    """In one file with the projector, which is a module to save there; read again it is the same model."""
    assert main(["export", f"--from={root}/both", f"--to={tmp_path}/hf", "--family=hf", "--part=adapter"]) == 0
    names = load_file(tmp_path / "hf" / "adapter_model.safetensors").keys()
    assert "base_model.model.model.language_model.layers.1.self_attn.o_proj.lora_B.weight" in names
    assert "base_model.model.model.multi_modal_projector.linear_2.bias" in names
    assert len(names) == len(ADAPTER) + len(PROJECTOR)
    assert main(["import", f"--from={tmp_path}/hf", f"--base={root}/base", f"--to={tmp_path}/again"]) == 0
    tiny.assert_trees_equal(load(tmp_path / "again").params, load(root / "both").params)


@pytest.mark.parametrize("family", ["official", "hf"])
def test_a_projector_both_ways(root: Path, tmp_path: Path, family: str) -> None:
    flags = [f"--from={root}/both", f"--to={tmp_path}/out", f"--family={family}", "--part=projector"]
    assert main(["export", *flags]) == 0
    file = tmp_path / "out" / "mm_projector.safetensors"
    if family == "official":
        same(load_file(file), PROJECTOR)
    assert main(["import", f"--from={file}", f"--base={root}/base", f"--to={tmp_path}/ours"]) == 0
    found, base = load(tmp_path / "ours"), load(root / "base")
    tiny.assert_trees_equal(found.params["projector"], load(root / "both").params["projector"])
    tiny.assert_trees_equal(found.params["decoder"], base.params["decoder"])


def test_a_language_model_gets_the_product(root: Path, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    kept = {name: x for name, x in GOLDEN.weights.items() if "vision_tower" not in name and "mm_" not in name}
    save_file(kept, tmp_path / "files" / "model.safetensors")
    settings = {"model_type": "llama", "num_attention_heads": 6, "rms_norm_eps": 1e-5}
    (tmp_path / "files" / "config.json").write_text(json.dumps(settings))
    assert main(["import", f"--from={tmp_path}/files", f"--to={tmp_path}/lm"]) == 0
    (root / "release" / "non_lora_trainables.safetensors").rename(tmp_path / "aside")
    assert main(["import", f"--from={root}/release", f"--base={tmp_path}/lm", f"--to={tmp_path}/sum"]) == 0
    (tmp_path / "aside").rename(root / "release" / "non_lora_trainables.safetensors")
    assert main(["export", f"--from={tmp_path}/sum", f"--to={tmp_path}/out", "--family=hf"]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        theirs = f"model.layers.1.{name}"
        a, b = (ADAPTER[f"base_model.model.{theirs}.lora_{x}.default.weight"] for x in "AB")
        np.testing.assert_allclose(
            found[f"{theirs}.weight"], GOLDEN.weights[f"{theirs}.weight"] + 8 / 4 * b @ a, atol=1e-6
        )


@pytest.mark.slow
def test_a_run_with_an_adapter_goes_out_in_every_form(tmp_path: Path) -> None:
    """A smoke run by the command line: the whole model is the frozen one with the product of the adapter's file."""
    run = ["--config=configs/llava15_7b_lora.py:smoke", f"--workdir={tmp_path}/run", "--config.evals=()"]
    assert train([*run, "--config.train.steps=2", "--config.checkpoint.every=2", "--config.data.threads=1"]) == 0
    for name, flags in (("whole", []), ("adapter", ["--part=adapter"]), ("projector", ["--part=projector"])):
        assert main(["export", f"--from={tmp_path}/run", f"--to={tmp_path}/{name}", "--family=official", *flags]) == 0
    whole, small = (
        load_file(tmp_path / file) for file in ("whole/model.safetensors", "adapter/adapter_model.safetensors")
    )
    frozen = np.asarray(load(tmp_path / "run").params["decoder"]["blocks"]["mlp"]["fc2"]["kernel"])
    assert len(small) == 2 * 7 * len(frozen)
    for layer, kernel in enumerate(frozen):
        theirs = f"model.layers.{layer}.mlp.down_proj"
        a, b = (small[f"base_model.model.{theirs}.lora_{x}.weight"] for x in "AB")
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(whole[f"{theirs}.weight"], kernel.T + 8 / 4 * b @ a, atol=1e-6)
    same(load_file(tmp_path / "projector" / "mm_projector.safetensors"),
         {name: x for name, x in whole.items() if "mm_projector" in name})  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora = True of the config file is not supported, only False"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern = {'q_proj': 8} of the config file is not supported"),
        ({"r": 3}, "these weights are not an adapter of rank 3 for this base of this config: wrong shapes: model.lay"),
    ],
)
def test_adapters_of_another_kind_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    written(tmp_path / "in", **changes)
    assert main(["import", f"--from={tmp_path}/in", f"--base={root}/base", f"--to={tmp_path}/out"]) == 2
    assert message in capsys.readouterr().err


def test_what_does_not_fit_the_base_is_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ADAPTER | {"base_model.model.lm_head.lora_A.default.weight": np.zeros((4, 48), np.float32)}
    save_file({"model.mm_projector.weight": np.zeros((48, 32), np.float32)}, tmp_path / "mm_projector.safetensors")
    for arguments, message in (
        ([f"--from={written(tmp_path / 'in', more)}", f"--base={root}/base"], "unexpected names"),
        ([f"--from={root}/release", f"--base={root}/both"], "has an adapter already; take the checkpoint that it sta"),
        ([f"--from={tmp_path}", f"--base={root}/base"], "missing names: model.mm_projector.0.weight"),
        ([f"--from={root}/files/model.safetensors", f"--base={root}/base"], "holds more than a projector (lm_head"),
        ([f"--from={tmp_path}", f"--base={root}/base", "--tokenizer=none"], "with --base the base tells all else"),
        ([f"--from={root}/release"], "holds a part of a model; name the checkpoint that takes it with --base"),
        ([f"--from={tmp_path}/mm_projector.safetensors"], "holds a part of a model; name the checkpoint that takes it"),
    ):
        assert main(["import", *arguments, f"--to={tmp_path}/out"]) == 2, message
        assert message in capsys.readouterr().err
    assert main(["import", f"--from={root}", f"--base={root}/base", f"--to={tmp_path}/out"]) == 1
    assert "holds none of mm_projector.safetensors, mm_projector.bin; pass the file" in capsys.readouterr().err
    assert main(["export", f"--from={root}/base", f"--to={tmp_path}/x", "--family=hf", "--part=adapter"]) == 2
    assert "has no adapter: it was trained without objective.model.lora" in capsys.readouterr().err
