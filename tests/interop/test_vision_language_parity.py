"""LLaVA, LLaVA-NeXT, PaliGemma of transformers with random weights: logits, loss, greedy ids, files both ways."""

import itertools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from vision_language_rows import empty_rows

from vlm_jax.data.chat_config import LLAVA_NEXT
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.tiles import NEWLINE
from vlm_jax.interop.adapters import export_part, import_part
from vlm_jax.interop.commands import export_weights, import_weights
from vlm_jax.interop.registry import recognise
from vlm_jax.interop.tables import ConversionError, to_params
from vlm_jax.loading import load
from vlm_jax.models.generation import GenerationConfig
from vlm_jax.schema import override

IMAGE, WORDS, PROMPT = 95, 96, 4
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = SIZES | {"num_hidden_layers": 3, "image_size": 28, "patch_size": 14}
TEXT = SIZES | {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Modules of a block: (rows, columns) of their matrices.
ADAPTED = dict.fromkeys([f"self_attn.{name}_proj" for name in "qkvo"], (32, 32)) | {"mlp.down_proj": (32, 48)}


def llava() -> Any:
    vision, text = CLIPVisionConfig(**VISION), LlamaConfig(**TEXT, max_position_embeddings=128)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE))


def paligemma() -> Any:
    vision = SiglipVisionConfig(**VISION, vision_use_head=False)
    text = GemmaConfig(**TEXT, num_key_value_heads=1, head_dim=16)
    settings = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=32, vocab_size=WORDS
    )
    return PaliGemmaForConditionalGeneration(settings)


class Peer(NamedTuple):
    """Theirs, and the same in ours."""

    model: Any
    vlm: Any
    params: Any
    tensors: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=[llava, paligemma], ids=["llava", "paligemma"])
def peer(request: Any) -> Peer:
    torch.manual_seed(0)
    model = request.param().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    live = {name: value.numpy() for name, value in model.state_dict().items()}
    found, tensors = recognise(live)
    config = found.read_config(tensors, model.config.to_dict(), None)
    params = to_params(tensors, found.rows(config), found.shapes(config), found.title)
    return Peer(model, found.objective(config).build(PreprocessConfig(), jnp.float32), params, live)


def rows(learned: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Ours and theirs: an image, words, and `learned` more words at the end."""
    rng = np.random.default_rng(1)
    length = 4 + PROMPT + learned
    ids = rng.integers(3, 90, (2, length)).astype(np.int32)
    ids[:, :4] = IMAGE
    images = rng.normal(size=(2, 1, 28, 28, 3)).astype(np.float32)
    batch = empty_rows(2, length, images.shape[1:])
    batch |= {"text": np.where(ids == IMAGE, 0, ids), "tiles": images, "segments": np.ones_like(ids)}
    batch["positions"][:] = np.arange(length)
    batch["tile_slots"][:, :4] = np.arange(4)
    batch["supervised"][:, length - learned :] = learned > 0
    theirs = {
        "input_ids": torch.tensor(ids, dtype=torch.long),
        "pixel_values": torch.tensor(images[:, 0].transpose(0, 3, 1, 2)),
        "attention_mask": torch.ones((2, length), dtype=torch.long),
    }
    return batch, theirs


def test_logits_and_loss(peer: Peer) -> None:
    batch, theirs = rows(learned=5)
    learned = torch.tensor(batch["supervised"])
    labels = torch.where(learned, theirs["input_ids"], -100)
    extra = {"token_type_ids": learned.long()} if peer.vlm.config.prefix else {}
    with torch.no_grad():
        want = peer.model(**theirs, **extra, labels=labels)
    found = jax.jit(
        lambda params: (peer.vlm.loss(params, {}, batch, None, jnp.int32(0))[0], peer.vlm.outputs(params, batch))
    )
    (total, count), outputs = found(peer.params)
    np.testing.assert_allclose(outputs["logits"], want.logits.numpy(), atol=1e-4)
    assert float(total / count) == pytest.approx(float(want.loss), rel=1e-5)


def test_greedy_ids(peer: Peer) -> None:
    batch, theirs = rows(learned=0)
    extra = {"token_type_ids": torch.zeros_like(theirs["input_ids"])} if peer.vlm.config.prefix else {}
    with torch.no_grad():
        want = peer.model.generate(**theirs, **extra, max_new_tokens=6, do_sample=False, eos_token_id=None)
    config = GenerationConfig(max_new_tokens=6)
    found = jax.jit(lambda params: peer.vlm.answer(params, batch, config).ids)(peer.params)
    np.testing.assert_array_equal(found, want[:, -6:].numpy())


def test_files_both_ways(peer: Peer, tmp_path: Path) -> None:
    """What transformers saved comes in, goes out with the same bits, and is loaded by transformers again."""
    peer.model.save_pretrained(tmp_path / "theirs")
    said = import_weights(tmp_path / "theirs", tmp_path / "ours", preprocess="clip")
    assert "4 tokens an image" in said
    family = "hf_live" if peer.vlm.config.model.image.class_token else "hf"
    for target in {"hf", family}:
        export_weights(tmp_path / "ours", tmp_path / target, family=target)  # pyright: ignore
    again = type(peer.model).from_pretrained(tmp_path / "hf").state_dict()
    for name, tensor in peer.tensors.items():
        np.testing.assert_array_equal(again[name].numpy(), tensor, err_msg=name)
    if family == "hf_live":
        written = load_file(tmp_path / "hf_live" / "model.safetensors")
        assert written.keys() == peer.tensors.keys()
        assert all(np.array_equal(written[name], tensor) for name, tensor in peer.tensors.items())
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["image_token_index"] == IMAGE
    chat = load(tmp_path / "ours").config.data.chat
    assert chat is not None
    assert (chat.template == "paligemma") == peer.vlm.config.prefix


def test_an_adapters_files_mean_what_they_mean_to_peft(tmp_path: Path) -> None:
    """transformers' model with alpha / rank times B A, of the files that we write, added to the modules they name."""
    torch.manual_seed(1)
    model, rng = llava().eval(), np.random.default_rng(0)
    model.save_pretrained(tmp_path / "theirs")
    import_weights(tmp_path / "theirs", tmp_path / "base", preprocess="clip")
    small = {}
    for layer, (name, (rows_, columns)) in itertools.product(range(2), ADAPTED.items()):
        module = f"base_model.model.model.layers.{layer}.{name}"
        small[f"{module}.lora_A.weight"] = 0.3 * rng.normal(size=(3, columns)).astype(np.float32)
        small[f"{module}.lora_B.weight"] = 0.3 * rng.normal(size=(rows_, 3)).astype(np.float32)
    (tmp_path / "adapter").mkdir()
    save_file(small, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 5}))
    projector = {
        f"model.mm_projector.{2 * layer}.{name}": torch.randn_like(x)
        for layer in range(2)
        for name, x in model.model.multi_modal_projector.get_submodule(f"linear_{layer + 1}").named_parameters()
    }
    torch.save(projector, tmp_path / "mm_projector.bin")  # as a first stage of LLaVA leaves it
    import_part(tmp_path / "mm_projector.bin", tmp_path / "projected", tmp_path / "base")
    import_part(tmp_path / "adapter", tmp_path / "ours", tmp_path / "projected")
    export_part(tmp_path / "ours", tmp_path / "out", part="adapter", family="hf")

    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    modules = {name.rpartition(".lora_")[0] for name in written if ".lora_" in name}
    assert len(modules) == 2 * len(ADAPTED)
    assert {re.sub(r"^base_model\.model\.", "", name) for name in modules} == {
        name for name, _ in model.named_modules() if re.fullmatch(settings["target_modules"], name)
    }
    batch, theirs = rows(learned=5)
    with torch.no_grad():
        plain = model(**theirs).logits
        for name in modules:
            a, b = (torch.tensor(written[f"{name}.lora_{x}.weight"]) for x in "AB")
            weight = model.get_submodule(name.removeprefix("base_model.model.")).weight
            weight += settings["lora_alpha"] / settings["r"] * b @ a
        saved = {name: x for name, x in written.items() if name.startswith("base_model.model.model.multi_modal_")}
        for name, x in saved.items():
            model.get_parameter(name.removeprefix("base_model.model.")).copy_(torch.tensor(x))
        assert {x.tobytes() for x in saved.values()} == {x.numpy().tobytes() for x in projector.values()}
        want = model(**theirs).logits.numpy()
    both = load(tmp_path / "ours")
    found = jax.jit(both.config.objective.build(PreprocessConfig(), jnp.float32).outputs)(both.params, batch)["logits"]
    np.testing.assert_allclose(found, want, atol=1e-4)
    assert np.abs(want - plain.numpy()).max() > 0.01


NEXT_SIZES = [(37, 91), (91, 37), (30, 30), (200, 33), (40, 53)]  # height and width of images: five grids of tiles


@pytest.fixture(scope="module")
def next_peer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """(LLaVA-NeXT of transformers, our import of it, what it was saved as)."""
    torch.manual_seed(2)
    pinpoints = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    vision, text = CLIPVisionConfig(**VISION), LlamaConfig(**TEXT, max_position_embeddings=128)
    settings = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_grid_pinpoints=pinpoints
    )
    model = LlavaNextForConditionalGeneration(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    root = tmp_path_factory.mktemp("next")
    model.save_pretrained(root / "theirs")
    sides = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    processor = LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, **sides)
    processor.save_pretrained(root / "theirs")
    import_weights(root / "theirs", root / "ours")
    return model, root, processor


def test_llava_next_on_images_of_odd_sizes(next_peer: Any) -> None:
    """Their image processor and model, our tiles and model: pixels, the features that are left, newlines, logits."""
    model, root, processor = next_peer
    ours = load(root / "ours")
    chat, method = ours.config.data.chat, override(ours.config.objective, {"length": 64, "tiles": 5})
    assert chat is not None
    outputs = jax.jit(method.build(ours.config.data.preprocess, jnp.float32).outputs)
    rng, grids = np.random.default_rng(0), set()
    for height, width in NEXT_SIZES:
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        seen = processor(images=[Image.fromarray(image)], return_tensors="pt")
        plan, tiles = chat.tiling.plan(height, width, 28, 4), chat.tiling.tiles(image, 28)
        slots = np.concatenate([piece for piece in plan.pieces if not isinstance(piece, str)])
        grids.add((plan.tiles, (slots == NEWLINE).sum().item()))
        words = rng.integers(3, 90, 6)
        length = len(slots) + len(words)
        batch = empty_rows(1, 64, (5, 28, 28, 3)) | {"tiles": np.zeros((1, 5, 28, 28, 3), np.uint8)}
        batch["tiles"][0, : len(tiles)], batch["tile_slots"][0, : len(slots)] = tiles, slots
        batch["text"][0, len(slots) : length], batch["segments"][0, :length] = words, 1
        batch["positions"][0, :length] = np.arange(length)
        pixels = (tiles.astype(np.float64) / 255 - processor.image_mean) / processor.image_std
        np.testing.assert_allclose(seen["pixel_values"][0].numpy().transpose(0, 2, 3, 1), pixels, atol=1e-5)
        ids = torch.tensor([[IMAGE] * len(slots) + words.tolist()])
        with torch.no_grad():
            want = model(input_ids=ids, **seen).logits[0].numpy()
        np.testing.assert_allclose(outputs(ours.params, batch)["logits"][0, :length], want, atol=1e-4)
    assert len(grids) > 2


def test_files_of_llava_next_both_ways(next_peer: Any, tmp_path: Path) -> None:
    model, root, _ = next_peer
    live = {name: x.numpy() for name, x in model.state_dict().items()}
    for family in ("hf", "hf_live", "official"):
        export_weights(root / "ours", tmp_path / family, family=family)  # pyright: ignore
    again = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "hf")
    for name, x in again.state_dict().items():
        np.testing.assert_array_equal(x.numpy(), live[name], err_msg=name)
    assert again.config.image_grid_pinpoints == model.config.image_grid_pinpoints
    written = load_file(tmp_path / "hf_live" / "model.safetensors")
    assert all(np.array_equal(written.pop(name), x) for name, x in live.items()) and not written
    # The authors' own names and order of grids.
    official = load_file(tmp_path / "official" / "model.safetensors")
    np.testing.assert_array_equal(official["model.image_newline"], live["model.image_newline"])
    import_weights(tmp_path / "official", tmp_path / "ours")
    ours, theirs = load(tmp_path / "ours"), load(root / "ours")
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(ours.params), jax.tree.leaves(theirs.params), strict=True
    ):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))
    assert ours.config.data.chat == LLAVA_NEXT


def test_other_grids_of_llava_next_are_refused(next_peer: Any, tmp_path: Path) -> None:
    settings = json.loads((next_peer[1] / "theirs" / "config.json").read_text()) | {"image_grid_pinpoints": [[28, 28]]}
    (tmp_path / "model.safetensors").symlink_to(next_peer[1] / "theirs" / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ConversionError, match=r"image_grid_pinpoints = \[\[28, 28\]\] of the config file is not support"
    ):
        import_weights(tmp_path, tmp_path / "ours", preprocess="clip")
