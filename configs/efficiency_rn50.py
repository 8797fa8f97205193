"""The three methods of CLIP's figure 2 at the paper's size: ResNet-50 and text models of 63 M parameters.

Radford et al. 2021, section 2.3. `:caption` predicts the caption with a transformer, `:bag_of_words` predicts its set
of words, `:contrastive_bag` compares it by its words alone, and the default is CLIP's RN50. The paper gives no other
hyperparameters for the first three; here they are those of clip_rn50.py. It found the second three times as efficient
as the first in images to equal zero-shot accuracy on ImageNet, and the third four times as the second.
"""

import dataclasses
from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.models.captioner import CaptionerModelConfig
from vlm_jax.models.presets import CLIP
from vlm_jax.models.word_predictor import WordPredictorConfig
from vlm_jax.objectives.bag_of_words import BagOfWordsConfig
from vlm_jax.objectives.caption import CaptionConfig
from vlm_jax.objectives.clip import ClipConfig
from vlm_jax.parts import EVERYTHING

RECIPE = config_module(Path(__file__).with_name("clip_rn50.py"))


def get_config(name: str = "") -> Config:
    towers = CLIP["RN50"]
    bag = dataclasses.replace(towers.text, depth=0, pool="mean", mask_padding=True, pos_embed="none")
    methods = {
        "caption": CaptionConfig(model=CaptionerModelConfig(towers.image)),
        "bag_of_words": BagOfWordsConfig(model=WordPredictorConfig(towers.image)),
        "contrastive_bag": ClipConfig(model=dataclasses.replace(towers, text=bag)),
    }
    config = dataclasses.replace(RECIPE.get_config(), name="efficiency_rn50", parts=EVERYTHING)
    variants = {key: {"objective": objective} for key, objective in methods.items()}
    return variant(config, name, {**variants, "smoke": RECIPE.SMOKE})
