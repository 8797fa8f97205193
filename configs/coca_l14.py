"""CoCa with a ViT-L/14 at global batch 65536 (Yu et al. 2022).

Optimiser, schedule, batch and loss weights are the paper's; the sizes are those of open_clip's coca_ViT-L-14, which has
published weights and therefore its form of pooling too (one pooler for both tasks; the paper's is "cascade"). The
paper's own models take images of 288 pixels in patches of 18, the same number of patches. Needs captioned images:
--config.data.path='shards/{00000..99999}.tar'; for CLIP's own vocabulary, the merges file of an installed
open_clip_torch or --config.data.tokenizer.path=FILE.
Published zero-shot top-1 on ImageNet: 75.6 % (open_clip's L/14 on LAION-2B); 86.3 % for the paper's 2.1 B parameters.
"""

from pathlib import Path

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, config_module, variant
from vlm_jax.data.images import AugmentConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import TarConfig
from vlm_jax.data.text import ClipBpeConfig
from vlm_jax.mesh import MeshConfig
from vlm_jax.models.attentional_pool import AttentionalPoolConfig
from vlm_jax.models.captions import CaptionStart
from vlm_jax.models.coca import COCA_L14, CoCaModelConfig
from vlm_jax.models.text import TextConfig
from vlm_jax.models.transformer import CrossDecoderConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.coca import CoCaConfig
from vlm_jax.optim import Adafactor
from vlm_jax.parts import Part
from vlm_jax.schedule import Linear
from vlm_jax.schema import override

STEPS, BATCH = 500_000, 65_536

RECIPE = config_module(Path(__file__).with_name("clip_l14.py"))

# The same recipe on drawn scenes, with towers and a vocabulary that a CPU trains in seconds.
SMOKE = {
    **RECIPE.SMOKE,
    "objective.model": CoCaModelConfig(
        image=AttentionalPoolConfig(
            ViTConfig(image_size=32, patch_size=8, width=64, depth=2, heads=2, mlp_dim=128, pool="none"),
            form="open_clip",
            queries=8,
            width=64,
            heads=2,
        ),
        text=TextConfig(
            vocab_size=512, length=32, width=64, depth=2, heads=2, mlp_dim=128, pool="cls", mask_padding=True, eos_id=1
        ),
        decoder=CrossDecoderConfig(width=64, depth=2, heads=2, mlp_dim=128, self_mlp_dim=128),
        start=CaptionStart("model", 1),
        embed_dim=32,
    ),
}


def get_config(name: str = "") -> Config:
    remat = ("image.tower.remat", "text.remat", "decoder.remat")
    config = Config(
        name="coca_l14",
        objective=CoCaConfig(
            model=override(COCA_L14, dict.fromkeys(remat, "full")), contrastive_weight=1.0, caption_weight=2.0
        ),
        data=DataConfig(
            source=TarConfig(),
            batch_size=BATCH,
            augment=AugmentConfig(scale=(0.9, 1.0)),
            tokenizer=ClipBpeConfig(length=76),
            workers=8,
        ),
        optimizer=Adafactor(
            learning_rate=8e-4, weight_decay=0.01, momentum=0.9, b2=0.999, schedule=Linear(warmup_steps=STEPS // 50)
        ),
        parts=(
            Part("image", "image/.*"),
            Part("text", "text/.*"),
            Part("decoder", "decoder/.*"),
            Part("scale", "logit_scale"),
        ),
        mesh=MeshConfig(data=1, fsdp=-1, fsdp_most=16),
        train=TrainConfig(steps=STEPS, log_every=100),
        checkpoint=CheckpointConfig(every=2000, keep=3, keep_every=50_000),
    )
    return variant(config, name, {"smoke": SMOKE})
