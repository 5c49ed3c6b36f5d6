"""Options of textual inversion: the new word, what its vectors begin with, and what captions say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from library.errors import Problem
from library.file_names import safe_file_name
from library.option_groups import OptionGroup, opt
from library.training.options import SaveOptions, TrainingOptions
from library.training.options_network import FROZEN_FLOAT8, unfused

TENSOR_NAMES = ("emb_params", "token")


@dataclass(frozen=True, kw_only=True)
class InversionOptions(OptionGroup, title="inversion"):
    """The new word, and what its vectors begin with."""

    token_string: str | None = opt(
        None,
        metadata_key="ss_token_string",
        help="The new word: the captions contain it, and prompts will. No word that the tokenizer knows already.",
    )
    num_vectors_per_token: int = opt(
        1,
        at_least=1,
        metadata_key="ss_num_vectors_per_token",
        help="Vectors that the word stands for: more of them hold more detail, and take up more of a prompt.",
    )
    init_word: str | None = opt(
        None,
        resume="free",
        help="Known word, or several, whose vectors the new ones begin with, such as dog. Default: random vectors.",
    )
    weights: str | None = opt(
        None, path=True, resume="free", help="Embedding file that training begins with, in any layout."
    )
    use_object_template: bool = opt(
        False, help="Train with sentences such as `a photo of {}` for an object, in place of captions."
    )
    use_style_template: bool = opt(
        False, help="Train with sentences such as `a painting in the style of {}`, in place of captions."
    )
    save_tensor_name: str = opt(
        "emb_params",
        choices=TENSOR_NAMES,
        resume="free",
        help="What the vectors are called in saved files: emb_params as usual, or like the word (token), which tells "
        "diffusers what the word is.",
    )

    @property
    def uses_templates(self) -> bool:
        """Whether sentences take the place of captions."""
        return self.use_object_template or self.use_style_template

    def warn(self) -> Iterator[Problem]:
        """Point out what another option makes useless."""
        if self.use_object_template and self.use_style_template:
            yield Problem("--use_style_template", "has no effect, since --use_object_template is given")
        if self.weights and self.init_word is not None:
            yield Problem("--init_word", "has no effect, since --weights is given")


_CHANGES: dict[str, dict[str, Any]] = {
    # A key of data set files everywhere; here the command line has it too.
    "in_json": {"flag": "in_json"},
    "fp8_base": FROZEN_FLOAT8,
    "save_model_as": {"default": "pt", "choices": ("ckpt", "pt", "safetensors"), "help": "Format of saved embeddings."},
    "output_name": {"help": "Start of the names of saved files. Default: --token_string."},
}
_LEFT_OUT = (
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate",
    "no_token_padding",
    "use_safetensors",
    "weighted_captions",
)


@dataclass(frozen=True, kw_only=True)
class InversionTrainingOptions(TrainingOptions, changes=_CHANGES, leave_out=_LEFT_OUT):
    """What scripts share that train words."""

    inversion: InversionOptions = field(default_factory=InversionOptions)

    tracker_name: ClassVar[str] = "textual_inversion"

    def __post_init__(self) -> None:
        if self.optimizer.fused_backward_pass:
            object.__setattr__(self, "optimizer", unfused(self.optimizer))
        if self.save.output_name is None and self.inversion.token_string:
            object.__setattr__(self, "save", _named_like(self.save, self.inversion.token_string))

    def check_together(self) -> Iterator[Problem]:
        """Yield what is wrong between groups."""
        from library.training.checks_inversion import check_inversion

        yield from super().check_together()
        yield from check_inversion(self)

    def warn_together(self) -> Iterator[Problem]:
        """Yield what is suspicious between groups."""
        from library.training.checks_inversion import warn_inversion

        yield from super().warn_together()
        yield from warn_inversion(self)


def _named_like(save: SaveOptions, word: str) -> SaveOptions:
    """Return the options with the word as name of files; what not every system takes in a name becomes `_`."""
    name = safe_file_name(word)
    return replace(save, output_name=name) if name else save
