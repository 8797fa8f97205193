"""The class that lmms-eval asks: its requests as questions to a checkpoint. Only imported by lmms-eval."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]

from vlm_jax.evals.lmms_eval.asking import Asked, Asker
from vlm_jax.models.generation import GenerationConfig
from vlm_jax.schema import ConfigError

_MOST_TOKENS = 1024  # what other models of lmms-eval write at most where a task doesn't say


class VlmJax(lmms):
    """A checkpoint of vlm_jax.

    Args:
        pretrained: a workdir, one of its step directories, or an imported checkpoint.
        batch_size: questions at a time.
        device: ignored; a checkpoint lies on all devices that JAX sees.
        seed: of tasks that sample.
        overrides: `config.KEY=VALUE`, changes in the saved config, such as `config.mesh.fsdp=8`.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        seed: int = 0,
        max_batch_size: int | None = None,
        **overrides: Any,
    ):
        super().__init__()
        del device, max_batch_size  # lmms-eval hands them to every model
        wrong = [key for key in overrides if not key.startswith("config.")]
        if wrong:
            raise ConfigError(
                f"model_args holds {wrong[0]!r}; give pretrained, batch_size, seed, or config.KEY=VALUE to change the "
                "checkpoint's config"
            )
        if not str(batch_size).isdecimal():
            raise ConfigError(f"batch_size = {batch_size!r} must be a number; the size of a batch isn't searched for")
        self.pretrained, self.batch_size, self._seed = pretrained, int(batch_size), seed
        changes = {key.removeprefix("config."): value for key, value in overrides.items()}
        self._asker = Asker(pretrained, self.batch_size, changes)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, in the order of requests `(context, gen_kwargs, doc_to_visual, doc_id, task, split)`."""
        asked, wishes = [], []
        for request in requests:
            context, gen_kwargs, doc_to_visual, doc_id, task, split = request.args
            asked.append(Asked(context, _images(doc_to_visual(self._doc(task, split, doc_id)))))
            wishes.append(gen_kwargs)
        answers = self._answers(asked, wishes)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:2], answer)
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of all rounds of each request `(context, gen_kwargs, doc_to_visual, doc_to_text, doc_id, ...)`.

        The task's `doc_to_text` makes the question of every round but the first from the answers so far, and ends them.
        """
        answers: list[list[str]] = [[] for _ in requests]
        notes: list[Any] = [None] * len(requests)
        asked: dict[int, Asked] = {}
        for number, request in enumerate(requests):
            context, _, doc_to_visual, _, doc_id, task, split = request.args
            asked[number] = Asked(context, _images(doc_to_visual(self._doc(task, split, doc_id))))
        turn = 0
        while asked:
            said = self._answers(list(asked.values()), [requests[number].args[1] for number in asked])
            turn += 1
            following: dict[int, Asked] = {}
            for number, answer in zip(asked, said, strict=True):
                answers[number].append(answer)
                _, _, _, doc_to_text, doc_id, task, split = requests[number].args
                visuals, context, ended, kept, notes[number] = doc_to_text(
                    self._doc(task, split, doc_id),
                    previous_output=answers[number],
                    round_idx=turn,
                    previous_round_info=notes[number],
                )
                answers[number] = list(kept)
                if not ended:
                    following[number] = Asked(context, _images(visuals))
            asked = following
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-probability, whether it would be written) of the continuation of each request.

        Requests are `(context, doc_to_target, doc_to_visual, doc_id, task, split)`; a target may be a text.
        """
        asked = []
        for request in requests:
            context, doc_to_target, doc_to_visual, doc_id, task, split = request.args
            doc = self._doc(task, split, doc_id)
            target = doc_to_target if isinstance(doc_to_target, str) else doc_to_target(doc)
            asked.append(Asked(context, _images(doc_to_visual(doc)), target))
        return self._asker.likelihoods(asked)

    def _doc(self, task: str, split: str, doc_id: Any) -> Any:
        return self.task_dict[task][split][doc_id]

    def _answers(self, asked: Sequence[Asked], wishes: Sequence[Mapping[str, Any]]) -> list[str]:
        """Those that shall be written alike are asked together."""
        groups: dict[str, list[int]] = {}
        for number, wish in enumerate(wishes):
            groups.setdefault(json.dumps(dict(wish), sort_keys=True, default=str), []).append(number)
        answers = [""] * len(asked)
        for numbers in groups.values():
            wish = wishes[numbers[0]]
            config, sampled = generation(wish)
            said = self._asker.answers([asked[n] for n in numbers], config, self._seed if sampled else None)
            for number, text in zip(numbers, said, strict=True):
                answers[number] = until(text, wish.get("until"))
        return answers


def generation(wish: Mapping[str, Any]) -> tuple[GenerationConfig, bool]:
    """(how answers are written, whether they are sampled) by a task's gen_kwargs.

    `max_new_tokens`, `temperature`, `do_sample`, `top_p`, `top_k` and `num_beams` are heard, others concern the models
    that know them. As with transformers, a temperature of 0 takes the likeliest token.
    """
    temperature = float(wish.get("temperature") or 0.0)
    sampled = temperature > 0 and bool(wish.get("do_sample", True))
    config = GenerationConfig(
        max_new_tokens=int(wish.get("max_new_tokens") or _MOST_TOKENS),
        temperature=temperature if sampled else 1.0,
        top_p=float(wish.get("top_p") or 1.0) if sampled else 1.0,
        top_k=int(wish.get("top_k") or 0) if sampled else 0,
        beams=1 if sampled else int(wish.get("num_beams") or 1),
    )
    return config, sampled


def until(text: str, ends: str | Sequence[str] | None) -> str:
    """The text up to the first of some ends."""
    for end in [ends] if isinstance(ends, str) else ends or ():
        text = text.partition(end)[0] if end else text
    return text


def _images(visuals: Any) -> tuple[np.ndarray, ...]:
    """Pillow images of a request, perhaps none, as uint8 [H, W, 3]; raises `ConfigError` for a video."""
    found = []
    for visual in visuals or ():
        if not hasattr(visual, "convert"):
            raise ConfigError(f"a task shows a {type(visual).__name__}; this model sees images alone")
        found.append(np.asarray(visual.convert("RGB")))
    return tuple(found)
