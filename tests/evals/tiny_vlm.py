"""A vision-language model of a few thousand parameters, its tokenizer, and scenes to ask it about."""

from vlm_jax.data.chat_config import ChatConfig
from vlm_jax.data.sources import ShapesConfig
from vlm_jax.data.text import SentencePieceConfig, build_tokenizer
from vlm_jax.data.tiles import SquareTiling
from vlm_jax.models.decoder import DecoderConfig
from vlm_jax.models.vision_language import VisionLanguageConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.vlm import VlmConfig

SCENES = ShapesConfig(count=7, image_size=16, conversations=("color", "compare", "text"))
TOKENIZER = build_tokenizer(
    SentencePieceConfig(vocab_size=400), [text for i in range(60) for text in SCENES.build("").texts(i % 7)]
)
TOWER = ViTConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_dim=32, pool="none")
DECODER = DecoderConfig(width=32, depth=2, heads=4, kv_heads=2, mlp_dim=48, vocab_size=400, init="smollm")
CHAT = ChatConfig(template="paligemma", tiling=SquareTiling(), row_length=96, max_tiles=2)
OBJECTIVE = VlmConfig(model=VisionLanguageConfig(image=TOWER, decoder=DECODER), length=96, tiles=2, prefix=True)
