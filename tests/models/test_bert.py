"""BERT's encoders against transformers' with random weights: of any depth, split anywhere, looking at images or not."""

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.flops import count_dot_flops
from vlm_jax.interop.hf_bert import HfBert, cross_rows
from vlm_jax.interop.tables import from_params, to_params, within
from vlm_jax.mesh import unbox
from vlm_jax.models.bert import MaskedWordHeadConfig, TextEncoder, TextStack, TextStackConfig
from vlm_jax.models.grad_cam import attention_cam, token_cam
from vlm_jax.models.transformer import stack_layers, unstack_layers
from vlm_jax.objectives.mlm import MlmConfig, MlmModelConfig, MlmModule

torch = pytest.importorskip("torch")
from transformers import BertConfig, BertForMaskedLM  # noqa: E402 - transformers needs torch
from transformers.models.bert import modeling_bert  # noqa: E402

LAYERS, WIDTH = 4, 24
IDS = np.asarray([[2, 7, 9, 11, 5, 0, 0], [2, 30, 31, 8, 9, 10, 12]], np.int32)
IMAGE = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
FORMAT = HfBert()


@pytest.fixture(scope="module")
def reference() -> Any:
    """A decoder only in that its layers look at an image too; its attention is told to see both ways."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.3,
        attn_implementation="eager",
        is_decoder=True,
        add_cross_attention=True,
    )
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for layer in model.bert.encoder.layer:
            for name in ("key", "value"):  # images have another width than texts
                setattr(layer.crossattention.self, name, torch.nn.Linear(16, WIDTH))
    return model


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def ours(reference: Any) -> tuple[MlmModelConfig, Any, Any]:
    """(config, parameters of encoder and head, what each layer has besides for images)."""
    canonical = FORMAT.canonical(tensors_of(reference))
    cross = {name: value for name, value in canonical.items() if "crossattention" in name}
    plain = {name: value for name, value in canonical.items() if name not in cross}
    settings = {**reference.config.to_dict(), "is_decoder": False, "add_cross_attention": False}
    config = FORMAT.read_config(plain, settings, None)
    params = to_params(FORMAT.own(plain, config), FORMAT.rows(config), FORMAT.shapes(config), FORMAT.title)
    shapes = {}
    for name in ("query", "key", "value"):
        shapes |= {f"cross/{name}/kernel": (LAYERS, WIDTH if name == "query" else 16, 4, 6)}
        shapes |= {f"cross/{name}/bias": (LAYERS, 4, 6)}
    shapes |= {"cross/out/kernel": (LAYERS, 4, 6, WIDTH), "cross/out/bias": (LAYERS, WIDTH)}
    shapes |= {f"ln_cross/{name}": (LAYERS, WIDTH) for name in ("scale", "bias")}
    besides = to_params(cross, within(cross_rows(), "", "bert.encoder.layer.{layer}."), shapes, "what looks at images")
    return config, params, besides


def reference_states(model: Any, layers: list[bool], seen: np.ndarray | None = None) -> np.ndarray:
    """One pass through all layers by hand; `layers` says which of them look at the image, and `seen` at what of it."""
    with torch.no_grad():
        return reference_pass(model, layers, seen)[1].numpy()


def reference_pass(model: Any, layers: list[bool], seen: np.ndarray | None = None) -> tuple[Any, Any]:
    """(embeddings, states) of torch, which may be differentiated."""
    mask = torch.tensor(np.where(IDS == 0, -1e9, 0.0), dtype=torch.float32)[:, None, None, :]
    image_mask = None if seen is None else torch.tensor(np.where(seen, 0.0, -1e9), dtype=torch.float32)[:, None, None]
    x = embeddings = model.bert.embeddings(torch.tensor(IDS, dtype=torch.long))
    for layer, looks in zip(model.bert.encoder.layer, layers, strict=True):
        x = layer(
            x, mask, encoder_hidden_states=torch.tensor(IMAGE) if looks else None, encoder_attention_mask=image_mask
        )
    return embeddings, x


def layer_params(params: Any, besides: Any, places: list[tuple[int, bool]]) -> Any:
    """The stack of some layers, each with what looks at images or without."""
    plain, cross = unstack_layers(params["text"]["blocks"]), unstack_layers(besides)
    return stack_layers([plain[place] | (cross[place] if looks else {}) for place, looks in places])


@pytest.mark.parametrize("split", range(LAYERS))
def test_a_text_pass_and_a_fusion_pass_are_one_pass(split: int, reference: Any, ours: Any) -> None:
    """For every split, and the text half is a BERT of its depth."""
    config, params, besides = ours
    text = dataclasses.replace(config.text, depth=split)
    own = {name: value for name, value in params["text"].items() if name != "blocks"}
    if split:
        own["blocks"] = layer_params(params, besides, [(place, False) for place in range(split)])
    states = jax.jit(lambda p: TextEncoder(text).apply({"params": p}, IDS)["tokens"])(own)  # pyright: ignore
    stack = {key.name: getattr(config.text, key.name) for key in dataclasses.fields(TextStackConfig)}
    fusion = TextStackConfig(**stack | {"depth": LAYERS - split, "cross_every": 1})  # pyright: ignore
    upper = {"blocks": layer_params(params, besides, [(place, True) for place in range(split, LAYERS)])}
    valid = jnp.asarray(IDS != 0)
    fused = jax.jit(lambda p, x: TextStack(fusion).apply({"params": p}, x, valid, IMAGE)["tokens"])(upper, states)  # pyright: ignore
    expected = reference_states(reference, [False] * split + [True] * (LAYERS - split))
    np.testing.assert_allclose(fused, expected, atol=2e-5)
    shorter = reference.bert.encoder.layer[:split]
    with torch.no_grad():
        x = reference.bert.embeddings(torch.tensor(IDS, dtype=torch.long))
        mask = torch.tensor(np.where(IDS == 0, -1e9, 0.0), dtype=torch.float32)[:, None, None, :]
        for layer in shorter:
            x = layer(x, mask)
    np.testing.assert_allclose(states, x.numpy(), atol=2e-5)


def test_every_second_layer_looks_at_the_image(reference: Any, ours: Any) -> None:
    config, params, besides = ours
    own = {name: value for name, value in params["text"].items() if name != "blocks"}
    embed = dataclasses.replace(config.text, depth=0)
    states = jax.jit(lambda p: TextEncoder(embed).apply({"params": p}, IDS)["tokens"])(own)  # pyright: ignore
    stack = {key.name: getattr(config.text, key.name) for key in dataclasses.fields(TextStackConfig)}
    fusion = TextStackConfig(**stack | {"cross_every": 2})  # pyright: ignore
    groups = [
        {f"layer_{i}": layer_params(params, besides, [(2 * g + i, i == 0)]) for i in range(2)}
        for g in range(LAYERS // 2)
    ]
    blocks = jax.tree.map(lambda *leaves: np.concatenate(leaves), *groups)
    run = jax.jit(lambda p, x: TextStack(fusion).apply({"params": {"blocks": p}}, x, jnp.asarray(IDS != 0), IMAGE))
    expected = reference_states(reference, [True, False] * 2)
    np.testing.assert_allclose(run(blocks, states)["tokens"], expected, atol=2e-5)  # pyright: ignore


def test_what_is_padding_of_a_context_is_not_attended_to(reference: Any, ours: Any) -> None:
    config, params, besides = ours
    own = {name: value for name, value in params["text"].items() if name != "blocks"}
    embed = TextEncoder(dataclasses.replace(config.text, depth=0))
    stack = {key.name: getattr(config.text, key.name) for key in dataclasses.fields(TextStackConfig)}
    fusion = TextStack(TextStackConfig(**stack | {"cross_every": 1}))  # pyright: ignore
    layers = {"blocks": layer_params(params, besides, [(place, True) for place in range(LAYERS)])}
    seen = np.asarray([[True] * 5, [True, False, True, True, False]])

    @jax.jit
    def run(own: Any, layers: Any) -> Any:
        states = embed.apply({"params": own}, IDS)["tokens"]  # pyright: ignore
        return fusion.apply({"params": layers}, states, jnp.asarray(IDS != 0), IMAGE, context_valid_BxS=seen)["tokens"]  # pyright: ignore

    np.testing.assert_allclose(run(own, layers), reference_states(reference, [True] * LAYERS, seen), atol=2e-5)


@pytest.mark.parametrize(("looks", "layer"), [([True] * LAYERS, 2), ([True] * LAYERS, 3), ([True, False] * 2, 1)])
def test_grad_cam_is_that_of_torch(
    looks: list[bool], layer: int, reference: Any, ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a score of the first token, by the weights with which torch multiplies; `layer` among those that look."""
    config, params, besides = ours
    seen: list[Any] = []

    def kept(module: Any, *arguments: Any, **options: Any) -> Any:
        out, weights = eager(module, *arguments, **options)
        if module is reference.bert.encoder.layer[np.flatnonzero(looks)[layer]].crossattention.self:
            seen.append(weights)
        return out, weights

    eager = modeling_bert.eager_attention_forward
    monkeypatch.setattr(modeling_bert, "eager_attention_forward", kept)
    direction = np.random.default_rng(1).normal(size=WIDTH).astype(np.float32)
    states, expected = reference_pass(reference, looks)
    (gradient,) = torch.autograd.grad((expected[:, 0] @ torch.tensor(direction)).sum(), seen[0])
    stack = {key.name: getattr(config.text, key.name) for key in dataclasses.fields(TextStackConfig)}
    fusion = TextStackConfig(**stack | {"cross_every": LAYERS // sum(looks)})  # pyright: ignore
    size = fusion.cross_every
    groups = [layer_params(params, besides, [(place, looks[place])]) for place in range(LAYERS)]
    if size == 1:
        blocks = jax.tree.map(lambda *leaves: np.concatenate(leaves), *groups)
    else:
        paired = [{f"layer_{i}": groups[size * g + i] for i in range(size)} for g in range(LAYERS // size)]
        blocks = jax.tree.map(lambda *leaves: np.concatenate(leaves), *paired)
    valid = jnp.asarray(IDS != 0)
    run = jax.jit(lambda p, x: attention_cam(fusion, p, x, valid, IMAGE, layer, lambda x: x[:, 0] @ direction))
    cam = run({"blocks": blocks}, states.detach().numpy())
    wanted = gradient.clamp(min=0) * seen[0]
    np.testing.assert_allclose(cam, wanted.detach(), atol=2e-6, rtol=1e-4)
    assert (gradient < 0).any() and np.max(cam) > 1e-3
    by_loops = [
        np.mean([np.asarray(cam)[row, :, token].mean(axis=0) for token in np.flatnonzero(IDS[row])], axis=0)
        for row in range(len(IDS))
    ]
    np.testing.assert_allclose(token_cam(cam, valid), by_loops, rtol=1e-5)


def test_layers_look_at_two_images_in_turn_by_the_same_keys(reference: Any, ours: Any) -> None:
    """Of torch's four layers each second one has the keys and values of the one before it, as in NLVR2."""
    config, params, besides = ours
    images = np.stack([IMAGE, np.roll(IMAGE, 1, axis=0) + 1], axis=1)
    mask = torch.tensor(np.where(IDS == 0, -1e9, 0.0), dtype=torch.float32)[:, None, None, :]
    with torch.no_grad():
        states = x = reference.bert.embeddings(torch.tensor(IDS, dtype=torch.long))
        for place in range(LAYERS):
            layer = copy.deepcopy(reference.bert.encoder.layer[place])
            for name in ("key", "value"):
                first = reference.bert.encoder.layer[place - place % 2].crossattention.self
                setattr(layer.crossattention.self, name, getattr(first, name))
            x = layer(x, mask, encoder_hidden_states=torch.tensor(images[:, place % 2]))
    groups = []
    for first in range(0, LAYERS, 2):
        pair = [layer_params(params, besides, [(first + i, True)]) for i in range(2)]
        shared = {name: pair[0]["cross"][name] for name in ("key", "value")}
        own = [layer | {"cross": {name: layer["cross"][name] for name in ("query", "out")}} for layer in pair]
        groups.append({"cross": shared} | {f"layer_{i}": layer for i, layer in enumerate(own)})
    blocks = jax.tree.map(lambda *leaves: np.concatenate(leaves), *groups)
    stack = {key.name: getattr(config.text, key.name) for key in dataclasses.fields(TextStackConfig)}
    fusion = TextStack(TextStackConfig(**stack | {"cross_every": 1, "contexts": 2}))  # pyright: ignore
    run = jax.jit(lambda p, x: fusion.apply({"params": {"blocks": p}}, x, jnp.asarray(IDS != 0), images)["tokens"])  # pyright: ignore
    np.testing.assert_allclose(run(blocks, states.numpy()), x.numpy(), atol=2e-5)
    shapes = jax.tree.map(np.shape, unbox(jax.eval_shape(fusion.init, jax.random.key(0), states.numpy(), None, images)))
    assert shapes["params"]["blocks"] == jax.tree.map(np.shape, blocks)


@pytest.fixture(scope="module")
def plain() -> Any:
    """A BertForMaskedLM as it is trained, of another shape."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=40, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=16, initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


def test_masked_language_model_and_its_gradients(plain: Any) -> None:
    """Logits, loss and all gradients of BertForMaskedLM; and the file comes back bit for bit."""
    stored = tensors_of(plain)
    canonical = FORMAT.canonical(stored)
    model = FORMAT.read_config(canonical, plain.config.to_dict(), None)
    assert (model.text.depth, model.text.heads, model.words.tied) == (3, 3, True)
    tensors, rows = FORMAT.own(canonical, model), FORMAT.rows(model)
    params = to_params(tensors, rows, FORMAT.shapes(model), FORMAT.title)
    labels = np.where(np.arange(7)[None] % 3 == 1, IDS, -100)
    mask = torch.tensor((IDS != 0).astype(np.int64))
    out = plain(torch.tensor(IDS, dtype=torch.long), attention_mask=mask, labels=torch.tensor(labels, dtype=torch.long))
    out.loss.backward()
    still = dataclasses.replace(model.text, dropout=0.0, attention_dropout=0.0)
    config = MlmConfig(model=dataclasses.replace(model, text=still), text_length=7)
    objective = config.build(None, jnp.float32)  # pyright: ignore[reportArgumentType]
    batch = {"text": jnp.asarray(IDS), "masked_text": jnp.asarray(IDS), "chosen": jnp.asarray(labels != -100)}
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def run(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            (total, count), _ = objective.loss(params, {}, batch, keys, jnp.int32(0))
            return total / count

        return jax.value_and_grad(loss)(params), objective.outputs(params, batch)["word_logits"]

    (value, gradients), logits = run(params)
    np.testing.assert_allclose(logits, out.logits.detach().numpy(), atol=2e-5)
    assert float(value) == pytest.approx(out.loss.item(), rel=1e-5)
    theirs = {name: p.grad.numpy() for name, p in plain.named_parameters() if p.grad is not None}
    ours = from_params(gradients, rows, FORMAT.title)
    assert ours.keys() == FORMAT.own(FORMAT.canonical(theirs), model).keys()
    for name, value in ours.items():
        scale = max(np.abs(theirs[name]).max(), 1e-2)  # the bias of keys has rounding alone
        np.testing.assert_allclose(value / scale, theirs[name] / scale, atol=1e-4, rtol=0, err_msg=name)
    back = FORMAT.published(from_params(params, rows, FORMAT.title))
    for name, value in back.items():
        np.testing.assert_array_equal(value, stored[name], err_msg=name)


def test_what_is_exported_loads_in_transformers(plain: Any, tmp_path: Any) -> None:
    canonical = FORMAT.canonical(tensors_of(plain))
    model = FORMAT.read_config(canonical, plain.config.to_dict(), None)
    written = BertConfig(**FORMAT.write_config(model))
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        assert getattr(written, key) == getattr(plain.config, key)
    assert written.max_position_embeddings == 16


def test_an_untied_head_of_another_width_has_a_table_of_its_own() -> None:
    text = MlmModelConfig().text
    small = dataclasses.replace(text, width=8, heads=2, mlp_dim=8, depth=1, vocab_size=12, positions=8)
    for tied, expected in ((True, {"transform", "norm", "bias"}), (False, {"transform", "norm", "bias", "table"})):
        module = MlmModule(MlmModelConfig(small, MaskedWordHeadConfig(tied=tied)))
        params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]  # pyright: ignore
        assert params["words"].keys() == expected


def test_flops_are_those_of_the_jaxpr() -> None:
    small = dataclasses.replace(
        MlmModelConfig().text, width=8, heads=2, mlp_dim=12, depth=2, vocab_size=12, positions=8
    )
    model = MlmModelConfig(small)
    module, ids = MlmModule(model), jax.ShapeDtypeStruct((3, 6), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), ids)
    counted = count_dot_flops(lambda p, x: module.apply(p, x)["word_logits"], params, ids)  # pyright: ignore
    assert counted == 3 * model.forward_flops(6)
    stack = TextStackConfig(width=8, heads=2, mlp_dim=12, depth=4, cross_every=2)
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (((3, 6, 8), jnp.float32), ((3, 6), bool))]
    image = jax.ShapeDtypeStruct((3, 5, 4), jnp.float32)
    params = jax.eval_shape(TextStack(stack).init, jax.random.key(0), *shapes, image)
    counted = count_dot_flops(lambda p, *x: TextStack(stack).apply(p, *x)["tokens"], params, *shapes, image)  # pyright: ignore
    assert counted == 3 * stack.stack_flops(6, 5, 4)


def test_dropout_is_on_weights_of_attention_too() -> None:
    """With keys the outputs of rows differ by their own keys alone; at rate 0 the keys are of no consequence."""
    small = dataclasses.replace(
        MlmModelConfig().text, width=8, heads=2, mlp_dim=8, depth=1, vocab_size=40, positions=8, dropout=0.0
    )
    keys = jax.random.split(jax.random.key(1), 2)
    for rate, same in ((0.0, True), (0.5, False)):
        module = TextEncoder(dataclasses.replace(small, attention_dropout=rate))
        run = jax.jit(lambda params, ids, keys, module=module: module.apply(params, ids, keys)["tokens"])
        params = jax.tree.map(lambda x: x * 20, jax.jit(module.init)(jax.random.key(0), IDS))
        plain, dropped = run(params, IDS, None), run(params, IDS, keys)
        assert np.allclose(plain, dropped, atol=1e-5) == same
        one = run(params, IDS[1:], keys[1:])
        np.testing.assert_allclose(one[0], dropped[1], atol=1e-5)
