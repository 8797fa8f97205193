"""Conversation templates as data: what stands around the messages of a system, a user and an assistant.

`chat` fills them in. Special tokens are named in `specials`; `{bos}` and `{eos}` are those of the tokenizer. They are
looked for in the templates alone and never in a message.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written down. `{}` stands for the message.

    Attributes:
        user: a turn of the user.
        prompt: what the assistant's turn begins with; the model is given it when it shall answer.
        answer: the assistant's message and its end: all of it is learned.
        after: what follows the answer without being learned.
        start: what comes first.
        system: a system message; empty: there is no place for one.
        default_system: the message where a conversation has none; empty: `system` is left out then.
        system_in_user: the system message stands at the front of the first user message instead of before it.
        specials: special tokens in the strings above, beside `{bos}` and `{eos}`.
        reads_user_text: False throws the user's words away and keeps the images.
        images_first: a user's images stand before all of the turn, its start token included.
    """

    user: str
    prompt: str
    answer: str
    after: str = ""
    start: str = ""
    system: str = ""
    default_system: str = ""
    system_in_user: bool = False
    specials: tuple[str, ...] = ()
    reads_user_text: bool = True
    images_first: bool = False


_CHATML = ChatTemplate(
    system="<|im_start|>system\n{}<|im_end|>\n",
    user="<|im_start|>user\n{}<|im_end|>\n",
    prompt="<|im_start|>assistant\n",
    answer="{}<|im_end|>",
    after="\n",
    specials=("<|im_start|>", "<|im_end|>"),
)
_SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

TEMPLATES = {
    # LLaVA-1.5 instruction tuning (Vicuna v1.1)
    "vicuna_v1": ChatTemplate(
        start="{bos}",
        system="{} ",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        user="USER: {} ",
        prompt="ASSISTANT:",
        answer=" {}{eos}",
    ),
    # LLaVA-1.5 stage 1: image, caption, line feed; no end token
    "plain": ChatTemplate(start="{bos}", user="{}", prompt="", answer="{}\n", reads_user_text=False),
    # the same with an end token, for models that must learn to stop
    "plain_eos": ChatTemplate(start="{bos}", user="{}", prompt="", answer="{}\n{eos}", reads_user_text=False),
    # Llama-2-chat; each round begins with the start token
    "llama_2": ChatTemplate(
        system="<<SYS>>\n{}\n<</SYS>>\n\n",
        system_in_user=True,
        user="{bos}[INST] {} [/INST]",
        prompt="",
        answer=" {} {eos}",
    ),
    "chatml": _CHATML,
    "smollm2": dataclasses.replace(_CHATML, default_system=_SMOLLM2_SYSTEM),
    "qwen": dataclasses.replace(_CHATML, default_system="You are a helpful assistant."),
    # PaliGemma: images, start token, prompt, line feed; the answer ends with the end token
    "paligemma": ChatTemplate(user="{bos}{}\n", prompt="", answer="{}{eos}", images_first=True),
    # SmolLM2 in nanoVLM: no system message, and the line feed after the end token is learned too
    "nanovlm": dataclasses.replace(_CHATML, answer="{}<|im_end|>\n", after=""),
}
"""The templates by name."""
