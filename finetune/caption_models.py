"""Captioning models of transformers: found in a folder, the local cache or on the hub, and loaded without their code.

Weights are read as safetensors, or as pickles of which nothing is executed. Code that a repository brings along is
never run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.blip_weights import read_original, structure_of
from finetune.caption_checks import check_loaded, check_structure
from finetune.caption_inputs import ImageRecipe, recipe_of
from library.checkpoints.folders import choose_weights, open_folder_weights, shard_names
from library.checkpoints.hub import from_hub, is_hub_id, near_names
from library.errors import UserError

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_BERT = "bert-base-uncased"
_SHARED = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}
"""Weights that BLIP has twice; files may hold one of them, and not every transformers knows."""


@dataclass(frozen=True)
class CaptionModel:
    """A model with what makes its inputs and reads its outputs.

    Attributes:
        model: of transformers, on its device.
        tokenizer: of transformers.
        recipe: what is done to pictures; None: `processor` does it.
        processor: of transformers, for pictures and texts together; None when `recipe` is enough.
    """

    model: Any
    tokenizer: Any
    recipe: ImageRecipe | None
    processor: Any = None

    @property
    def kind(self) -> str:
        """The name of the architecture, such as ``blip`` or ``git``."""
        return str(self.model.config.model_type)


def load_folder(
    name: str, option: str, *, device: torch.device, dtype: torch.dtype | None, hub: bool = True
) -> CaptionModel:
    """Load a model with its tokenizer and processor.

    Args:
        name: a folder, or with `hub` the id of a repository.
        option: that named it, for messages.
        device: where it shall work.
        dtype: of its weights; None chooses: float32, except for large models on a GPU, which stay as stored.
        hub: whether other names than folders may be looked up there.

    Raises:
        UserError: there is no such model, it is not complete, or transformers does not know its architecture.
    """
    path = Path(name).expanduser()
    where = f"{option} {name}"
    if path.is_dir():
        folder = path
    elif path.exists() or not hub:
        raise UserError("is not a folder of transformers", near_names(path), where=where)
    elif not is_hub_id(name):
        raise UserError("no such file or folder", near_names(path), where=where)
    else:
        folder = from_hub(name, option, near=near_names(path), wanted=_wanted_files, is_complete=_is_complete)
    if not (folder / "config.json").is_file():
        raise UserError("holds no config.json, so it is no model of transformers", where=where)
    _quiet()
    try:
        model = _load_model(folder, device, dtype)
        tokenizer, processor = _load_processor(folder)
        check_loaded(model, tokenizer)
        recipe = recipe_of(processor.image_processor) if model.config.model_type in ("blip", "git") else None
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - the boundary: a damaged folder may upset transformers in any way
        hint = "Is the folder complete, and this transformers new enough? Code in model folders is not run."
        raise UserError(f"cannot be loaded: {_first_line(error)}", hint, where=where) from error
    return CaptionModel(model.to(device).eval(), tokenizer, recipe, None if recipe else processor)


def load_blip(file: Path, tokenizer: str | None, *, device: torch.device, dtype: torch.dtype | None) -> CaptionModel:
    """Load a BLIP checkpoint in the layout of its authors.

    Args:
        file: the checkpoint.
        tokenizer: vocabulary, see `bert_vocabulary`.
        device: where it shall work.
        dtype: of its weights; None: float32.

    Raises:
        UserError: the file is no BLIP captioning model, or there is no vocabulary.
    """
    from transformers import BlipConfig, BlipForConditionalGeneration

    tensors = read_original(file)
    structure: dict[str, Any] = structure_of(tensors, file)
    vocabulary = bert_vocabulary(tokenizer, file.parent)
    words = bert_tokenizer(vocabulary)
    count = structure["text_config"]["vocab_size"]
    if len(words) != count:
        what = f"has {len(words)} words with [DEC] and [ENC], and {file.name} wants {count}"
        raise UserError(what, f"Give the vocabulary of {_BERT}.", where=str(vocabulary))
    structure["text_config"].update(
        bos_token_id=words.convert_tokens_to_ids("[DEC]"),
        sep_token_id=words.sep_token_id,
        pad_token_id=words.pad_token_id,
    )
    _quiet()
    config = BlipConfig(**structure)
    model = _from_tensors(BlipForConditionalGeneration, config, tensors, str(file))
    size = structure["vision_config"]["image_size"]
    return CaptionModel(model.to(device, dtype).eval(), words, ImageRecipe(size_wh=(size, size)))


def bert_vocabulary(named: str | None, beside: Path) -> Path:
    """Return the file with the vocabulary of BERT: one that is named, one beside the checkpoint, or from the hub.

    Raises:
        UserError: there is none.
    """
    if named is not None:
        path = Path(named).expanduser()
        file = path / "vocab.txt" if path.is_dir() else path
        if not file.is_file():
            raise UserError("no such vocabulary", near_names(file), where=f"--tokenizer {named}")
        return file
    if (beside / "vocab.txt").is_file():
        return beside / "vocab.txt"
    try:
        folder = from_hub(
            _BERT,
            "--tokenizer",
            wanted=lambda names: [name for name in names if name == "vocab.txt"],
            is_complete=lambda folder: (folder / "vocab.txt").is_file(),
        )
    except UserError as error:
        hint = f"Put vocab.txt of {_BERT} beside it, name it with --tokenizer, or use a transformers folder of BLIP"
        what = f"needs the vocabulary of {_BERT}, which is not in the local cache and cannot be fetched"
        raise UserError(what, f"{hint} (--local_model)", where=str(beside)) from error
    return folder / "vocab.txt"


def bert_tokenizer(vocabulary: Path) -> Any:
    """Return BERT's tokenizer with the two words that BLIP adds, the same in every version of transformers.

    Args:
        vocabulary: file with one word in each line.

    Raises:
        UserError: it is no vocabulary of BERT.
    """
    from tokenizers import BertWordPieceTokenizer
    from transformers import PreTrainedTokenizerFast

    from library.text_files import read_text

    words = read_text(vocabulary).split("\n")
    lacking = {"[PAD]", "[UNK]", "[CLS]", "[SEP]"} - set(words)
    if lacking:
        raise UserError(f"is no vocabulary of BERT: it lacks {sorted(lacking)[0]}", where=str(vocabulary))
    table = {word: index for index, word in enumerate(word for word in words if word)}
    pieces = BertWordPieceTokenizer(vocab=table, lowercase=True)
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[DEC]", "[ENC]"]})
    return tokenizer


def _load_model(folder: Path, device: torch.device, dtype: torch.dtype | None) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(f"a model of the kind {config.model_type} makes no texts from pictures")
    model_class: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    as_stored = dtype is None and device.type != "cpu" and config.model_type not in ("blip", "git")
    weights = choose_weights(item.name for item in folder.iterdir())
    if weights is None:
        raise ValueError("there are no weights in it")
    check_structure(config)
    tensors = open_folder_weights(folder)  # checks the files, too
    if "safetensors" not in weights:
        return _from_tensors(model_class, config, tensors, str(folder)).to(dtype=dtype)
    named: dict[str, Any] = {_dtype_name(): "auto" if as_stored else dtype or "float32"}
    model, report = model_class.from_pretrained(
        folder, config=config, use_safetensors=True, local_files_only=True, output_loading_info=True, **named
    )
    return _complete(model, report, str(folder))


def _from_tensors(model_class: Any, config: Any, tensors: Mapping[str, Any], where: str) -> Any:
    """Return a model with the given weights, all of which must be there."""
    model, report = model_class.from_pretrained(None, config=config, state_dict=dict(tensors), output_loading_info=True)
    return _complete(model, report, where)


def _complete(model: Any, report: Mapping[str, Any], where: str) -> Any:
    """Return the model when no weights are missing other than those that it shares."""
    lacking = set(report["missing_keys"])
    for name, shared in _SHARED.items():
        if name in lacking and shared not in lacking:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, model.get_parameter(shared))
            lacking.discard(name)
    missing = sorted(name for name in lacking if not name.endswith("position_ids"))
    if missing or report.get("mismatched_keys"):
        first = missing[0] if missing else str(sorted(report["mismatched_keys"])[0])
        raise UserError(f"weights are missing or of another size: {first}", "Fetch the model again", where=where)
    return model


def _dtype_name() -> str:
    """Return what `from_pretrained` calls the type of the weights, which changed with transformers 4.56."""
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if version >= (4, 56) else "torch_dtype"


def _load_processor(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not (hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")):
        raise ValueError(f"{type(processor).__name__} does not make inputs from pictures and texts")
    return processor.tokenizer, processor


def _wanted_files(names: Iterable[str]) -> list[str]:
    """Return the files of a repository that make up a model with its processor: no code, one set of weights."""
    names = [name for name in names if "/" not in name]
    weights = choose_weights(names)
    if weights is None or "config.json" not in names:
        return []
    small = [name for name in names if name.endswith((".json", ".txt", ".jinja", ".model")) and ".index." not in name]
    return [*small, weights]


def _is_complete(folder: Path) -> bool:
    names = {item.name for item in folder.iterdir()}
    weights = choose_weights(names)
    if weights is None or "config.json" not in names:
        return False
    if weights.endswith(".json") and not set(shard_names(folder / weights).values()) <= names:
        return False
    return bool(names & set(_TOKENIZER_FILES)) and bool(names & set(_IMAGE_FILES))


def _quiet() -> None:
    """Keep transformers from drawing bars and remarks between our own lines."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def weights_file(name: str) -> Path | None:
    """Return the file that `--caption_weights` names, a URL being fetched once; None for a folder or a hub id.

    Raises:
        UserError: it cannot be fetched.
    """
    if name.startswith(("http://", "https://")):
        from finetune.downloads import fetch

        return fetch(name, "--caption_weights")
    path = Path(name).expanduser()
    return path if path.is_file() else None
