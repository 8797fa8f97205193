"""BERT-base by masked language modelling alone (Devlin et al. 2019, appendix A.2; no next sentences).

Needs texts, a line each, and a vocabulary, or makes one of the texts:
    python -m vlm_jax.main --config=configs/mlm_bert_base.py --config.data.path='texts/*.txt' \\
        --config.data.tokenizer.path=vocab.txt
or captions from any other source. What is trained starts the text and the fusion encoder of albef_4m.py.
Published: batch 256, a million steps, nine tenths of them on 128 tokens (this config) and the rest on 512 (`:512`, with
--config.init_from.path=runs/mlm_bert_base), AdamW at 1e-4 with 10,000 steps of warm-up and a linear decay, weight decay
0.01 on all but biases and norms, dropout 0.1.
Ours: a text is a line, cut where it is too long; theirs packs sentences of a document.
"""

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, variant
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import ShapesConfig, TextFilesConfig
from vlm_jax.data.text import WordPieceConfig
from vlm_jax.evals.held_out_loss import HeldOutLossConfig
from vlm_jax.losses.masked_words import WordMaskConfig
from vlm_jax.mesh import MeshConfig
from vlm_jax.models.bert import TextEncoderConfig
from vlm_jax.objectives.mlm import MlmConfig, MlmModelConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import Part
from vlm_jax.schedule import Cosine, Linear

STEPS, LONG_STEPS = 900_000, 100_000
NO_DECAY = r"(.*/)?(bias|scale)"

LONG = {"objective.text_length": 512, "data.tokenizer.length": 512, "train.steps": LONG_STEPS}
# The same recipe on the captions of drawn scenes, with an encoder that a CPU trains in seconds.
SMOKE = {
    "objective": MlmConfig(
        model=MlmModelConfig(TextEncoderConfig(vocab_size=128, positions=32, width=64, depth=2, heads=2, mlp_dim=128)),
        text_length=32,
        hidden_words=WordMaskConfig(mask_id=4, spared_ids=(0, 2, 3)),
    ),
    "data.source": ShapesConfig(image_size=16, count=512),
    "data.batch_size": 32,
    "data.workers": 0,
    "data.tokenizer.length": 32,
    "data.tokenizer.vocab_size": 128,
    "mesh": MeshConfig(),
    "optimizer.learning_rate": 1e-3,
    "optimizer.schedule": Cosine(warmup_steps=2),
    "train.steps": 6,
    "train.log_every": 2,
    "checkpoint.every": 3,
    "evals": (HeldOutLossConfig("shapes", ShapesConfig(image_size=16, split="test", count=64)),),
}


def get_config(name: str = "") -> Config:
    text = TextEncoderConfig(remat="auto")
    config = Config(
        name="mlm_bert_base",
        objective=MlmConfig(model=MlmModelConfig(text), text_length=128),
        data=DataConfig(
            source=TextFilesConfig(), batch_size=256, augment=None, tokenizer=WordPieceConfig(length=128), workers=8
        ),
        optimizer=AdamW(learning_rate=1e-4, weight_decay=0.01, eps=1e-6, schedule=Linear(warmup_steps=10_000)),
        parts=(Part("text", "text/.*", no_decay=NO_DECAY), Part("words", "words/.*", no_decay=NO_DECAY)),
        mesh=MeshConfig(data=-1),
        train=TrainConfig(steps=STEPS, log_every=100),
        checkpoint=CheckpointConfig(every=5000, keep=3, keep_every=100_000),
    )
    return variant(config, name, {"512": LONG, "smoke": SMOKE})
