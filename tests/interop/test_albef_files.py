"""ALBEF's files as whole steps: import with copies and queues, export, and initial weights from several checkpoints."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import vlm_jax
from vlm_jax.checkpoint import read_extra, read_params
from vlm_jax.config import load_config
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.word_pieces import SPECIAL
from vlm_jax.interop.albef import OfficialAlbef
from vlm_jax.interop.albef_classifier import OfficialPairClassifier
from vlm_jax.interop.commands import export_weights, import_weights
from vlm_jax.interop.files import read_weights
from vlm_jax.interop.hf_bert import HfBert
from vlm_jax.interop.hf_vit import HfViT, OfficialDeiT
from vlm_jax.interop.tables import from_params, to_params
from vlm_jax.losses.masked_words import WordMaskConfig
from vlm_jax.mesh import unbox
from vlm_jax.models.albef import AlbefModelConfig, deit_b16
from vlm_jax.models.bert import TextEncoderConfig, TextStackConfig
from vlm_jax.models.pair_classifier import PairClassifierConfig
from vlm_jax.objectives.albef import AlbefConfig
from vlm_jax.objectives.encoder import EncoderConfig, EncoderModelConfig
from vlm_jax.objectives.mlm import MlmConfig, MlmModelConfig
from vlm_jax.objectives.pair_classify import PairClassifyConfig
from vlm_jax.schema import ConfigError, override, to_dict
from vlm_jax.warm_start import InitFrom, InitPart, warm_extra, warm_start

torch = pytest.importorskip("torch")

SIZES: dict[str, Any] = {"width": 64, "heads": 1, "mlp_dim": 32}
MODEL = AlbefModelConfig(
    image=override(deit_b16(16), {**SIZES, "depth": 1, "patch_size": 8}),
    text=TextEncoderConfig(**SIZES, depth=1, vocab_size=24, positions=16),
    fusion=TextStackConfig(**SIZES, depth=2, cross_every=1),
    embed_dim=8,
)
CONFIG = AlbefConfig(model=MODEL, text_length=8, queue=12, hidden_words=WordMaskConfig(mask_id=4, spared_ids=(0, 2)))
FORMAT = OfficialAlbef()
ROOT = Path(__file__).parents[2]
VOCABULARY = [*SPECIAL, "a", "dog"]


def start(config: Any, seed: int) -> tuple[Any, Any]:
    objective = config.build(PreprocessConfig(), jnp.float32)
    return unbox(jax.jit(objective.init)(jax.random.key(seed)))


def file_of(params: Any, extra: Any) -> dict[str, np.ndarray]:
    tensors = FORMAT.published(from_params(params, FORMAT.rows(MODEL), FORMAT.title))
    return {**tensors, **FORMAT.write_extra(jax.tree.map(np.asarray, extra), MODEL)}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """(a training checkpoint as the authors save it, its parameters, its copies and queues)."""
    params, extra = start(CONFIG, 0)
    extra["averaged"] = jax.tree.map(lambda x: x * 1.5, extra["averaged"])
    extra["queue"]["pointer"] = jnp.int32(7)
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in file_of(params, extra).items()}
    for name in ("text_encoder", "text_encoder_m"):
        tensors[f"{name}.bert.embeddings.position_ids"] = torch.arange(16)[None]
    folder = tmp_path_factory.mktemp("albef")
    torch.save({"model": tensors, "epoch": 3, "config": {"queue_size": 12}}, folder / "checkpoint.pth")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder / "checkpoint.pth", params, extra


@pytest.fixture(scope="module")
def imported(published: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("imported")
    note = import_weights(published[0], target)
    assert "an official ALBEF" in note
    assert "squash" in note
    assert "wordpiece of 7 ids" in note
    return target


def test_everything_comes_in(published: Any, imported: Path) -> None:
    _, params, extra = published
    tiny.assert_trees_equal(read_params(imported)[0], params)
    tiny.assert_trees_equal(read_extra(imported), extra)
    model = vlm_jax.load(imported)
    assert model.config.objective.model == dataclasses.replace(MODEL)  # pyright: ignore[reportAttributeAccessIssue]
    assert model.tokenize(["A dog!"])[0].tolist()[:4] == [2, 5, 6, 0]


def test_everything_goes_out(published: Any, imported: Path, tmp_path: Path) -> None:
    export_weights(imported, tmp_path, family="official")
    written, stored = load_file(tmp_path / "model.safetensors"), read_weights(published[0]).tensors
    assert written.keys() == {name for name in stored if not name.endswith("position_ids")}
    for name, value in written.items():
        np.testing.assert_array_equal(value, stored[name], err_msg=name)


def test_a_run_goes_on_with_copies_and_queues(published: Any, imported: Path) -> None:
    _, params, extra = published
    ours, own = start(CONFIG, 1)
    init = InitFrom(path=str(imported), extra=True)
    config = {"objective": to_dict(CONFIG)}
    tiny.assert_trees_equal(warm_start(ours, init, config), params)
    tiny.assert_trees_equal(warm_extra(own, init, config), extra)
    own["queue"]["image"] = own["queue"]["image"][:8]
    with pytest.raises(ConfigError, match=r"queue/image: \[8, 8\] in this model, \[12, 8\] in the source"):
        warm_extra(own, init, config)


def test_copies_for_larger_images_have_their_positions_resized(published: Any, imported: Path) -> None:
    """As torch does it, and as the parameters' own are."""
    extra = published[2]
    larger = override(CONFIG, {"model.image.image_size": 24})
    ours, own = start(larger, 1)
    init, config = InitFrom(path=str(imported), extra=True), {"objective": to_dict(larger)}
    new, copies = warm_start(ours, init, config), warm_extra(own, init, config)["averaged"]
    table = np.asarray(extra["averaged"]["image"]["pos_embed"])
    grid = torch.from_numpy(table[1:].reshape(1, 2, 2, -1).copy()).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, size=(3, 3), mode="bicubic", align_corners=False)
    expected = np.concatenate([table[:1], resized.permute(0, 2, 3, 1).reshape(9, -1).numpy()])
    np.testing.assert_allclose(copies["image"]["pos_embed"], expected, atol=1e-6)
    np.testing.assert_allclose(copies["image"]["pos_embed"], 1.5 * new["image"]["pos_embed"], atol=1e-6)
    tiny.assert_trees_equal(copies["fusion"], extra["averaged"]["fusion"])


@pytest.mark.parametrize("recipe", ["albef_snli_ve.py", "albef_nlvr2.py:direct", "albef_nlvr2.py:assignment"])
def test_the_fine_tuning_recipes_start_from_it(recipe: str, published: Any, imported: Path) -> None:
    """By their own rules: doubled layers begin as the one that was trained, and so do their copies."""
    _, params, extra = published
    full = load_config(f"{ROOT}/configs/{recipe}")
    objective: Any = full.objective
    model = {"image": MODEL.image, "text": MODEL.text, "fusion": MODEL.fusion}
    contexts = objective.model.fusion.contexts
    if contexts > 1:
        model["fusion"] = dataclasses.replace(MODEL.fusion, depth=4, contexts=2)
    if "assignment" in recipe:
        model["embed_dim"] = 8
    config = dataclasses.replace(objective, model=dataclasses.replace(objective.model, **model), text_length=8)
    init, saved = dataclasses.replace(full.init_from, path=str(imported)), {"objective": to_dict(config)}
    random, own = start(config, 1)
    new = warm_start(random, init, saved)
    assert new.keys() == random.keys()
    trained = [(params, new)]
    if init.extra:
        copies = warm_extra(own, init, saved)["averaged"]
        trained.append((extra["averaged"], copies))
        tiny.assert_trees_equal(copies["classifier"], own["averaged"]["classifier"])
    for source, target in trained:
        tiny.assert_trees_equal(
            {name: target[name] for name in ("image", "text")}, {n: source[n] for n in ("image", "text")}
        )
        blocks, wanted = target["fusion"]["blocks"], source["fusion"]["blocks"]
        if contexts == 1:
            tiny.assert_trees_equal(blocks, wanted)
            continue
        own_cross = {name: wanted["cross"][name] for name in ("query", "out")}
        tiny.assert_trees_equal(blocks["cross"], {name: wanted["cross"][name] for name in ("key", "value")})
        for layer in ("layer_0", "layer_1"):
            tiny.assert_trees_equal(blocks[layer], wanted | {"cross": own_cross})


def test_a_classifier_of_two_images_comes_in_and_goes_out(tmp_path: Path) -> None:
    """By the authors' names: no `bert.`, layers 1 to 4 behind a text encoder of one, keys and values stored twice."""
    fusion = dataclasses.replace(MODEL.fusion, depth=4, contexts=2)
    model = PairClassifierConfig(image=MODEL.image, text=MODEL.text, fusion=fusion, classes=2)
    objective = PairClassifyConfig(model=model, text_length=16)
    params, extra = start(objective, 0)
    extra["averaged"] = jax.tree.map(lambda x: x * 1.5, extra["averaged"])
    form = OfficialPairClassifier()
    written = {**form.published(from_params(params, form.rows(model), form.title)), **form.write_extra(extra, model)}
    layer, blocks = "text_encoder.encoder.layer.{}.crossattention.{}.weight", params["fusion"]["blocks"]
    for place in range(4):
        group, own = place // 2, blocks[f"layer_{place % 2}"]["cross"]
        kernels = {"self.key": blocks["cross"]["key"], "self.query": own["query"]}
        for name, found in kernels.items():
            expected = np.asarray(found["kernel"][group]).reshape(found["kernel"].shape[1], -1).T
            np.testing.assert_array_equal(written[layer.format(1 + place, name)], expected)
    np.testing.assert_array_equal(written["cls_head.2.weight"], np.asarray(params["classifier"]["out"]["kernel"]).T)
    assert {
        "cls_head_m.0.bias",
        "text_encoder_m.embeddings.LayerNorm.weight",
        "visual_encoder_m.norm.bias",
    } <= written.keys()
    assert not [name for name in written if ".bert." in name]
    torch.save({"model": {name: torch.from_numpy(np.array(x)) for name, x in written.items()}}, tmp_path / "nlvr.pth")
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    import_weights(tmp_path / "nlvr.pth", tmp_path / "imported")
    tiny.assert_trees_equal(read_params(tmp_path / "imported")[0], params)
    tiny.assert_trees_equal(read_extra(tmp_path / "imported"), extra)
    export_weights(tmp_path / "imported", tmp_path / "exported", family="official")
    again = load_file(tmp_path / "exported" / "model.safetensors")
    assert again.keys() == written.keys()
    for name, value in again.items():
        np.testing.assert_array_equal(value, written[name], err_msg=name)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": Evil()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="holds more than weights"):
        import_weights(tmp_path / "x.pth", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def bert(folder: Path, seed: int, **changes: Any) -> tuple[Path, Any]:
    """(an imported BERT of three layers, its parameters), by way of Hugging Face's files."""
    model = MlmModelConfig(dataclasses.replace(MODEL.text, depth=3, **changes))
    params, _ = start(MlmConfig(model=model, text_length=8), seed)
    known = HfBert()
    save_file(dict(known.published(from_params(params, known.rows(model), ""))), folder / f"{seed}.safetensors")
    (folder / "config.json").write_text(json.dumps(known.write_config(model)))
    import_weights(folder / f"{seed}.safetensors", folder / f"bert{seed}")
    return folder / f"bert{seed}", params


@pytest.mark.parametrize("family", [HfViT(), OfficialDeiT()], ids=lambda family: family.title)
def test_encoders_from_three_checkpoints(family: Any, tmp_path: Path) -> None:
    """The image tower of one, the text half of a BERT, and layers of another, wider BERT as the fusion encoder."""
    (first, one), (second, two) = bert(tmp_path, 1), bert(tmp_path, 2, width=128, heads=2)
    tower, _ = start(EncoderConfig(model=EncoderModelConfig(MODEL.image)), 3)
    (tmp_path / "image").mkdir()
    save_file(from_params(tower, family.rows(MODEL.image), ""), tmp_path / "image" / "model.safetensors")
    (tmp_path / "image" / "config.json").write_text(json.dumps(family.write_config(MODEL.image)))
    import_weights(tmp_path / "image", tmp_path / "tower")
    fusion = dataclasses.replace(MODEL.fusion, width=128, heads=2)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, fusion=fusion))
    params, _ = start(config, 4)
    init = InitFrom(
        parts=(
            InitPart("image", "image/.*", str(tmp_path / "tower")),
            InitPart("text", "text/.*", str(first), layers=(0, 1)),
            InitPart(
                "fusion",
                "fusion/blocks/(attn|ln_1|mlp|ln_2)/.*",
                str(second),
                map=((r"fusion/(.*)", r"text/\1"),),
                layers=(1, 3),
            ),
            InitPart("words", "words/(norm|bias).*", str(first)),
            InitPart("nothing", "never/.*"),
        )
    )
    new = warm_start(params, init, {"objective": to_dict(config)})
    tiny.assert_trees_equal(new["image"], tower["image"])
    tiny.assert_trees_equal(new["text"]["token_embed"], one["text"]["token_embed"])
    tiny.assert_trees_equal(new["text"]["blocks"], jax.tree.map(lambda x: x[:1], one["text"]["blocks"]))
    for name in ("attn", "ln_1", "mlp", "ln_2"):
        expected = jax.tree.map(lambda x: x[1:3], two["text"]["blocks"][name])
        tiny.assert_trees_equal(new["fusion"]["blocks"][name], expected)
    for name in ("cross", "ln_cross"):  # as they were
        tiny.assert_trees_equal(new["fusion"]["blocks"][name], params["fusion"]["blocks"][name])
    tiny.assert_trees_equal(new["fusion"]["project"], params["fusion"]["project"])
    wrong = dataclasses.replace(init, parts=(dataclasses.replace(init.parts[1], layers=(3, 4)),))
    with pytest.raises(
        ConfigError, match=r"init_from.parts.text: .*layers \(3, 4\) of 3 in the source".replace(".*", "[^~]*")
    ):
        warm_start(params, wrong, {"objective": to_dict(config)})


def test_vit_is_transformers_vit() -> None:
    """Tokens of ViTModel with random weights."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8,
        initializer_range=0.3,
    )  # fmt: skip
    reference, known = ViTModel(config).eval(), HfViT()
    tensors = known.canonical({name: x.numpy() for name, x in reference.state_dict().items()})
    assert known.recognises(tensors)
    tower = known.read_config(tensors, config.to_dict(), None)
    params = to_params(tensors, known.rows(tower), known.shapes(tower), known.title)["image"]
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    tokens = jax.jit(lambda p, x: tower.build(None, jnp.float32).apply({"params": p}, x)["tokens"])(params, images)  # pyright: ignore
    with torch.no_grad():
        expected = reference(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).last_hidden_state
    np.testing.assert_allclose(tokens, expected.numpy(), atol=2e-5)
