"""Captions for all pictures of a folder: what a model is asked, how it decodes, and where its words go."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.caption_inputs import decoded
from library import files
from library.data.jobs import JobReport, PictureJob, run_pictures
from library.log import safe_text
from networks.tool_parts import show

if TYPE_CHECKING:
    import torch

    from finetune.caption_models import CaptionModel
    from finetune.picture_tools import PictureOptions

_log = logging.getLogger(__name__)

_SAMPLING_PENALTY = 1.1
"""BLIP's authors divide the logits of tokens that occurred by this when they sample."""

_PROMPTS = {"blip": "a picture of ", "florence2": "<CAPTION>", "paligemma": "caption en"}
_CHAT_PROMPT = "Describe this picture in one sentence."


@dataclass(frozen=True)
class Decoding:
    """How texts are made of what the model predicts.

    Attributes:
        method: ``greedy``, ``beam`` or ``nucleus``.
        max_length: most tokens of a text, for BLIP and GIT with those of the prompt.
        min_length: fewest tokens of a text.
        num_beams: number of beams.
        top_p: share of probability that nucleus sampling keeps.
        seed: of nucleus sampling.
    """

    method: str
    max_length: int
    min_length: int = 0
    num_beams: int = 1
    top_p: float = 0.9
    seed: int = 42


class Captioner:
    """Makes texts of pictures. Its methods are the stages of a `PictureJob`."""

    def __init__(self, model: CaptionModel, decoding: Decoding, *, prompt: str | None, root: Path) -> None:
        """Prepare.

        Args:
            model: with tokenizer and processor.
            decoding: how it is asked.
            prompt: how each text begins, or what is asked; None: what is usual for the model.
            root: folder of the pictures; the random numbers of a picture depend on its path in there.
        """
        self._model, self._decoding, self._root = model, decoding, root
        tokenizer: Any = model.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"  # texts go on at the right
        usual = _CHAT_PROMPT if self._chat else _PROMPTS.get(model.kind)
        self.prompt = usual if prompt is None else prompt
        self._most = decoding.max_length
        places = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
        if model.recipe is not None and places is not None and places < self._most:
            _log.warning("the model makes texts of %d tokens at most, not of %d", places, self._most)
            self._most = places

    @property
    def prepare(self) -> Callable[[Path], Any]:
        """What loader processes do with the path of a picture."""
        return self._model.recipe or decoded

    def gather(self, pictures: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Return the inputs of a batch: pixels, and the tokens of the prompt where there are some."""
        if self._model.recipe is not None:
            return {"pixel_values": self._model.recipe.pixel_values(pictures), **self._prompt_tokens(len(pictures))}
        texts: dict[str, Any] = {}
        if self.prompt:
            texts = {"text": [self._asked()] * len(pictures), "padding": True}
        made = self._model.processor(images=list(pictures), return_tensors="pt", **texts)
        known = signature(self._model.model.forward).parameters
        unwanted = {"token_type_ids"} - set(known)  # tokenizers give them unasked
        return {name: value for name, value in made.items() if hasattr(value, "to") and name not in unwanted}

    def work(self, paths: Sequence[Path], inputs: dict[str, torch.Tensor]) -> list[str]:
        """Return the text of each picture, in one line."""
        import torch

        model = self._model.model
        placed = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        with torch.inference_mode():
            made = model.generate(**placed, **self._settings(paths)).cpu()
        return self._texts(made, inputs.get("input_ids"))

    @property
    def _chat(self) -> bool:
        return bool(getattr(self._model.processor, "chat_template", None))

    def _asked(self) -> str:
        if not self._chat:
            return str(self.prompt)
        content = [{"type": "image"}, {"type": "text", "text": self.prompt}]
        message = [{"role": "user", "content": content}]
        return str(self._model.processor.apply_chat_template(message, add_generation_prompt=True))

    def _prompt_tokens(self, count: int) -> dict[str, torch.Tensor]:
        import torch

        if not self.prompt:
            return {}
        tokens = list(self._model.tokenizer(self.prompt).input_ids)
        # BLIP cuts the closing token off by itself; the others would take it for the end of the text.
        tokens = tokens if self._model.kind == "blip" else tokens[:-1]
        rows = torch.tensor([tokens] * count)
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}

    def _settings(self, paths: Sequence[Path]) -> dict[str, Any]:
        """Return the arguments of `generate`. Sampling is greedy decoding of scores that leave one token."""
        from transformers import LogitsProcessorList

        from finetune.caption_sampling import NucleusRows

        decoding = self._decoding
        words = "length" if self._model.recipe is not None else "new_tokens"
        settings: dict[str, Any] = {f"max_{words}": self._most, "do_sample": False, "num_beams": 1}
        if decoding.min_length:
            settings[f"min_{words}"] = decoding.min_length
        if decoding.method == "beam":
            settings["num_beams"] = decoding.num_beams
        elif decoding.method == "nucleus":
            names = [path.relative_to(self._root).as_posix() for path in paths]
            rows = NucleusRows(names, seed=decoding.seed, top_p=decoding.top_p)
            settings["logits_processor"] = LogitsProcessorList([rows])  # type: ignore[list-item]
            if self._model.kind == "blip":
                settings["repetition_penalty"] = _SAMPLING_PENALTY
        return settings

    def _texts(self, made: torch.Tensor, asked: torch.Tensor | None) -> list[str]:
        """Return what was made, without the prompt that many models repeat."""
        tokenizer = self._model.tokenizer
        if asked is not None and self._model.recipe is None:
            count = asked.shape[1]
            if made.shape[1] >= count and bool((made[:, :count] == asked).all()):
                made = made[:, count:]
        texts = [str(text) for text in tokenizer.batch_decode(made, skip_special_tokens=True)]
        if asked is not None and self._model.recipe is not None:
            texts = [_without(text, str(tokenizer.decode(asked[0], skip_special_tokens=True))) for text in texts]
        return [" ".join(text.split()) for text in texts]


def _without(text: str, beginning: str) -> str:
    beginning = beginning.strip()
    return text.strip().removeprefix(beginning)


def caption_pictures(
    options: PictureOptions, build: Callable[[], Captioner], *, title: str, mend: Callable[[str], str] = str
) -> JobReport:
    """Write a text beside every picture.

    Args:
        options: which pictures, and how they are loaded.
        build: loads the model; not called when there is nothing to do.
        title: of the progress bar.
        mend: what is done with each text before it is written.

    Raises:
        UserError: there are no pictures, the model cannot be used, or not one picture can.
        StopTraining: a signal arrived, or a text could not be saved.
    """
    paths, skip = options.pictures(), options.done()
    if skip is not None and all(map(skip, paths)):
        report = JobReport(title, skipped=len(paths))
        report.close()
        return report
    for folder in {path.parent for path in paths}:
        files.clean_litter(folder)
    captioner = build()

    def finish(path: Path, text: str) -> None:
        text = mend(text)
        files.write_text(options.text_file(path), f"{text}\n")
        if options.debug:
            show([safe_text(f"{path}: {text}")])

    job = PictureJob(title, captioner.prepare, captioner.work, finish, captioner.gather)
    workers = options.max_data_loader_n_workers
    report = run_pictures(paths, job, batch_size=options.batch_size, workers=workers, skip=skip)
    report.close()
    return report
