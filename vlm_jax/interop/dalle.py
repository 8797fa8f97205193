"""The encoder of DALL-E's discrete autoencoder as OpenAI published it, the visual tokenizer of BEiT.

The published `encoder.pkl` is a pickled module, which only its own code can open. Its tensors come in here, as
`torch.save(encoder.state_dict(), "encoder.pth")` or a safetensors file has them.
"""

from collections.abc import Mapping
from typing import Any

from vlm_jax.interop.formats import Format
from vlm_jax.interop.layouts import Shape
from vlm_jax.interop.tables import Row, Tensors, count_layers, module_shapes, shape_of
from vlm_jax.models.dvae import Dvae, DvaeModelConfig
from vlm_jax.objectives.dvae import DvaeConfig

_INPUT, _OUTPUT = "blocks.input.w", "blocks.output.conv.w"


class DalleEncoder(Format):
    """`Encoder` of the published code."""

    library, title, preprocess = "official", "DALL-E's encoder", "dalle"

    def recognises(self, tensors: Tensors) -> bool:
        """See the base. The decoder has the same names; its last convolution has six outputs."""
        return {_INPUT, _OUTPUT, "blocks.group_1.block_1.res_path.conv_1.w"} <= tensors.keys() and (
            tensors[_INPUT].shape[2:] == (7, 7)
        )

    def objective(self, model: DvaeModelConfig) -> DvaeConfig:
        """See the base."""
        return DvaeConfig(model=model)

    def claims(self, config: Any) -> bool:
        """Every discrete autoencoder; of one with a decoder the encoder goes out."""
        return isinstance(config, DvaeModelConfig)

    def parameters(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """See the base."""
        return {"encoder": params["encoder"]}

    def rows(self, config: DvaeModelConfig) -> list[Row]:
        """See the base."""
        names = {"input": "input", "output": "output.conv"}
        for group, width in enumerate(config.widths):
            for block in range(config.blocks):
                ours, theirs = f"group{group + 1}_block{block}", f"group_{group + 1}.block_{block + 1}"
                names |= {f"{ours}/conv{i}": f"{theirs}.res_path.conv_{i}" for i in range(1, 5)}
                if block == 0 and width != config.widths[max(group - 1, 0)]:
                    names[f"{ours}/shortcut"] = f"{theirs}.id_path"
        leaves = (("kernel", "w", "conv"), ("bias", "b", "same"))
        return [
            Row(f"encoder/{ours}/{leaf}", f"blocks.{theirs}.{their_leaf}", layout)
            for ours, theirs in names.items()
            for leaf, their_leaf, layout in leaves
        ]

    def shapes(self, config: DvaeModelConfig) -> dict[str, Shape]:
        """See the base."""
        shapes = module_shapes(Dvae(config), (1, config.image_size, config.image_size, 3))
        return {path: shape for path, shape in shapes.items() if path.startswith("encoder/")}

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> DvaeModelConfig:
        """See the base. Any image size will do; that of the published training is taken."""
        return DvaeModelConfig(
            vocab_size=shape_of(tensors, _OUTPUT, self.title)[0],
            width=shape_of(tensors, _INPUT, self.title)[0],
            blocks=count_layers(tensors, "blocks.group_1.block_{layer}.res_path.conv_1.w"),
            decoder=False,
        )

    def write_config(self, config: DvaeModelConfig) -> dict[str, Any]:
        """There is no file."""
        return {}


__all__ = ["DalleEncoder"]
