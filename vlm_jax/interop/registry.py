"""The formats that are known, and which of them given weights or a given model are. The formats are their own files."""

from typing import Any

from vlm_jax.interop.aim import AimBackbone, L3mAim
from vlm_jax.interop.aimv2 import Aimv2, HfAimv2
from vlm_jax.interop.albef import OfficialAlbef
from vlm_jax.interop.albef_classifier import OfficialPairClassifier
from vlm_jax.interop.albef_vqa import OfficialAlbefVqa
from vlm_jax.interop.beit import Beit
from vlm_jax.interop.big_vision import BigVisionSiglip
from vlm_jax.interop.dalle import DalleEncoder
from vlm_jax.interop.dinov2 import HfDinov2, OfficialDinov2
from vlm_jax.interop.formats import Format, Library
from vlm_jax.interop.hf_beit import HfBeit
from vlm_jax.interop.hf_bert import HfBert
from vlm_jax.interop.hf_clip import HfClip
from vlm_jax.interop.hf_decoder import HfDecoder
from vlm_jax.interop.hf_paligemma import HfPaliGemma
from vlm_jax.interop.hf_siglip import HfSiglip
from vlm_jax.interop.hf_swin import HfSwinSimMim
from vlm_jax.interop.hf_vit import HfViT, OfficialDeiT
from vlm_jax.interop.hf_vit_mae import HfViTMae
from vlm_jax.interop.llava import HfLiveLlava, HfLlava, OriginalLlava
from vlm_jax.interop.llava_next import HfLiveLlavaNext, HfLlavaNext, OriginalLlavaNext
from vlm_jax.interop.mae import Mae, MaeEncoder
from vlm_jax.interop.nanovlm import NanoVlm
from vlm_jax.interop.open_clip_coca import OpenClipCoCa
from vlm_jax.interop.open_clip_resnet import OpenClipResNet
from vlm_jax.interop.open_clip_timm import OpenClipTimmSiglip
from vlm_jax.interop.open_clip_vit import OpenClipViT
from vlm_jax.interop.simmim import SwinSimMim
from vlm_jax.interop.tables import ConversionError, Tensors

# In the order in which a model of ours is offered to the formats of a library.
FORMATS: tuple[Format, ...] = (
    HfSiglip(),
    HfClip(),
    OpenClipTimmSiglip(),
    OpenClipCoCa(),
    OpenClipResNet(),
    OpenClipViT(),
    BigVisionSiglip(),
    HfViTMae(),
    Mae(),
    MaeEncoder(),
    HfSwinSimMim(),
    SwinSimMim(),
    HfBeit(),
    Beit(),
    DalleEncoder(),
    AimBackbone(),
    L3mAim(),
    Aimv2(),
    HfAimv2(),
    HfDinov2(),
    OfficialDinov2(),
    NanoVlm(),
    HfPaliGemma(),
    OriginalLlavaNext(),
    HfLlavaNext(),
    HfLiveLlavaNext(),
    OriginalLlava(),
    HfLlava(),
    HfLiveLlava(),
    HfDecoder(),
    OfficialAlbef(),
    OfficialAlbefVqa(),
    OfficialPairClassifier(),
    HfBert(),
    HfViT(),
    OfficialDeiT(),
)


def recognise(tensors: Tensors, library: Library | None = None) -> tuple[Format, dict[str, Any]]:
    """The format that these names belong to, and the tensors under its canonical names.

    Args:
        tensors: as they stand in the file.
        library: whose they are, None to find out.

    Raises:
        ConversionError: they belong to none.
    """
    for candidate in FORMATS:
        if library in (None, candidate.library):
            canonical = candidate.canonical(tensors)
            if candidate.recognises(canonical):
                return candidate, canonical
    known = ", ".join(candidate.title for candidate in FORMATS if library in (None, candidate.library))
    raise ConversionError(f"the names (such as {', '.join(sorted(tensors)[:3])}) are those of none of: {known}")


def for_export(config: Any, library: Library) -> Format:
    """The format of a library in which a model of ours is written; raises `ConversionError` if there is none."""
    for candidate in FORMATS:
        if candidate.library == library and candidate.claims(config):
            return candidate
    able = {candidate.library: None for candidate in FORMATS if candidate.claims(config)}
    raise ConversionError(f"{library} has no such model; it can be exported with --family={'|'.join(able) or '(none)'}")


__all__ = ["FORMATS", "for_export", "recognise"]
