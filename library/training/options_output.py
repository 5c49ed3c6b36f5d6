"""Options of what a run writes: models, states, sample images, logs, metadata, uploads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from library.errors import Problem
from library.file_names import bad_file_name
from library.option_groups import OptionGroup, opt

SAMPLERS = (
    "ddim",
    "pndm",
    "lms",
    "euler",
    "euler_a",
    "heun",
    "dpm_2",
    "dpm_2_a",
    "dpmsolver",
    "dpmsolver++",
    "dpmsingle",
    "k_lms",
    "k_euler",
    "k_euler_a",
    "k_dpm_2",
    "k_dpm_2_a",
)

_SAMPLING = {"sample_every_n_steps": (), "sample_every_n_epochs": (), "sample_at_first": ()}
_STATES = {"save_state": (), "save_state_on_train_end": ()}
_UPLOADS = {"huggingface_repo_id": (), "resume_from_huggingface": ()}

OVERRIDES = {
    "lr": ("learning_rate", "learning_rate_te", "learning_rate_te1", "unet_lr", "text_encoder_lr", "embedding_lr"),
    "scheduler": ("schedule",),
    "steps": ("max_train_steps", "max_train_epochs"),
    "data": ("data", "subset"),
}
"""Names that `--resume_override` accepts besides groups and options, and what they stand for."""

NEWEST = ("latest", "auto")
"""Words for `--resume` that stand for the newest state of the run, if there is one."""


@dataclass(frozen=True, kw_only=True)
class SaveOptions(OptionGroup, title="save", resume="free"):
    """Where, when and how models are saved."""

    output_dir: str | None = opt(None, path=True, help="Folder for models, states and sample images.")
    output_name: str | None = opt(
        None, metadata_key="ss_output_name", help="Start of the names of saved files. Default: last, epoch or at."
    )
    save_model_as: str | None = opt(
        None,
        choices=("ckpt", "safetensors", "diffusers", "diffusers_safetensors"),
        help="Format of saved models. Default: that of the model that training started from.",
    )
    use_safetensors: bool = opt(False, help="Write safetensors files in place of pickles, whatever the format.")
    save_precision: str | None = opt(
        None, choices=("float", "fp16", "bf16"), help="Format of the numbers in saved models. Default: as trained."
    )
    save_every_n_epochs: int | None = opt(None, zero_is_off="quiet", help="Save a model after every n-th epoch.")
    save_every_n_steps: int | None = opt(None, zero_is_off="quiet", help="Save a model after every n-th update.")
    save_n_epoch_ratio: int | None = opt(
        None, zero_is_off="quiet", help="Save about this many times during the run; replaces --save_every_n_epochs."
    )
    save_last_n_epochs: int | None = opt(
        None,
        zero_is_off="quiet",
        matters_when={"save_every_n_epochs": (), "save_n_epoch_ratio": ()},
        help="Keep this many of the models that are saved after epochs.",
    )
    save_last_n_steps: int | None = opt(
        None,
        zero_is_off="quiet",
        matters_when={"save_every_n_steps": ()},
        help="Keep the models that were saved in this many last updates.",
    )
    overwrite: bool = opt(False, help="Write over models of an earlier run with the same --output_name.")
    save_retry_minutes: float = opt(
        10.0, at_least=0, help="How long to try again when a file cannot be written, before the run stops."
    )

    @property
    def backup_every(self) -> int | None:
        """Updates between two models and states that stay; None: there are none, in scripts without an option."""
        return None

    def check(self) -> Iterator[Problem]:
        """Refuse names that would write outside the output folder or that some system cannot store."""
        reason = bad_file_name(self.output_name) if self.output_name is not None else None
        if reason:
            yield Problem("--output_name", f"{self.output_name!r} {reason}", "Use --output_dir for the folder.")

    def warn(self) -> Iterator[Problem]:
        """Point out that --use_safetensors wins over a format that pickles."""
        if self.use_safetensors and self.save_model_as in ("ckpt", "diffusers"):
            what = f"{self.save_model_as} is written as safetensors, since --use_safetensors is given"
            yield Problem("--save_model_as", what)


@dataclass(frozen=True, kw_only=True)
class StateOptions(OptionGroup, title="state", resume="free"):
    """States: everything that is needed to go on with a run later."""

    save_state: bool = opt(False, help="Save a state with every model, and at the end.")
    save_state_on_train_end: bool = opt(False, help="Save a state at the end only.")
    save_last_n_epochs_state: int | None = opt(
        None,
        zero_is_off="quiet",
        matters_when=_STATES,
        help="Keep this many of the states saved after epochs. Default: --save_last_n_epochs.",
    )
    save_last_n_steps_state: int | None = opt(
        None,
        zero_is_off="quiet",
        matters_when=_STATES,
        help="Keep the states saved in this many last updates. Default: --save_last_n_steps.",
    )
    resume: str | None = opt(
        None,
        path=True,
        help="State folder to go on from; `latest` or `auto`: the newest complete one of this --output_name, if there "
        "is any.",
    )
    resume_from_huggingface: bool = opt(
        False,
        needs={"resume": ()},
        help="--resume names a state on Hugging Face: user/repository/path[:revision[:repository type]].",
    )
    resume_override: tuple[str, ...] = opt(
        (),
        matters_when={"resume": ()},
        help="Go on although these differ from the state: lr, scheduler, optimizer_args, data, steps, or the names of "
        "options or groups of options.",
    )
    fast_resume: bool = opt(
        False, matters_when={"resume": ()}, help="Check sizes of the state's files only, not their contents."
    )
    no_save_on_interrupt: bool = opt(False, help="Save no state when the run is interrupted (Ctrl-C, SIGTERM).")

    def allows(self, group: str, option: str) -> bool:
        """Tell whether `--resume_override` lets `option` of the group titled `group` differ from the state."""
        names = set(self.resume_override)
        for name in self.resume_override:
            names.update(OVERRIDES.get(name, ()))
        return group in names or option in names


@dataclass(frozen=True, kw_only=True)
class SampleOptions(OptionGroup, title="sample", resume="free"):
    """Sample images that are drawn during training."""

    sample_prompts: str | None = opt(
        None, path=True, matters_when=_SAMPLING, help="File with prompts: .txt (one per line), .toml or .json."
    )
    sample_every_n_steps: int | None = opt(
        None, zero_is_off="warn", needs={"sample_prompts": ()}, help="Draw samples after every n-th update."
    )
    sample_every_n_epochs: int | None = opt(
        None,
        zero_is_off="warn",
        needs={"sample_prompts": ()},
        help="Draw samples after every n-th epoch; replaces --sample_every_n_steps.",
    )
    sample_at_first: bool = opt(False, needs={"sample_prompts": ()}, help="Draw samples before training too.")
    sample_sampler: str = opt(
        "ddim", choices=SAMPLERS, matters_when=_SAMPLING, help="Sampler, where a prompt does not say (--ss)."
    )

    @property
    def folder(self) -> str | None:
        """Folder for sample images; None: inside that of the models, in scripts without an option."""
        return None

    def warn(self) -> Iterator[Problem]:
        """Point out that epochs win over steps."""
        if self.sample_every_n_steps and self.sample_every_n_epochs:
            yield Problem("--sample_every_n_steps", "has no effect, since --sample_every_n_epochs is given")


@dataclass(frozen=True, kw_only=True)
class LogOptions(OptionGroup, title="log", resume="free"):
    """What is logged, and where."""

    logging_dir: str | None = opt(None, path=True, help="Folder for TensorBoard logs; switches them on.")
    log_with: str | None = opt(
        None, choices=("tensorboard", "wandb", "all"), help="Where curves go. Default: TensorBoard, with --logging_dir."
    )
    log_prefix: str | None = opt(None, help="Start of the name of the run's folder inside --logging_dir.")
    log_tracker_name: str | None = opt(None, help="Name of the tracker (of the project, for wandb).")
    log_tracker_config: str | None = opt(None, path=True, help="TOML file with arguments of the tracker.")
    wandb_run_name: str | None = opt(
        None, matters_when={"log_with": ("wandb", "all")}, help="Name of the run in wandb."
    )
    wandb_api_key: str | None = opt(
        None,
        secret=True,
        matters_when={"log_with": ("wandb", "all")},
        help="Key for wandb; the variable WANDB_API_KEY keeps it out of process lists.",
    )
    log_config: bool = opt(False, help="Log the options of the run, without paths and keys.")
    console_log_level: str | None = opt(
        None, choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"), help="How much to report. Default: INFO."
    )
    console_log_file: str | None = opt(None, path=True, help="Write messages to this file, not to the console.")
    console_log_simple: bool = opt(False, help="Messages without time and level.")
    log_every_n_steps: int = opt(1, at_least=1, help="Write curves every n-th update.")

    @property
    def entity(self) -> str | None:
        """Owner of the project in wandb; None: the user, in scripts without an option."""
        return None

    def further_names(self, scalars: Mapping[str, float], step: int) -> Mapping[str, float]:
        """Return what users of other trainers look for under other names, among the scalars of an update."""
        return {}

    def check(self) -> Iterator[Problem]:
        """Refuse trackers that cannot run here."""
        from importlib.util import find_spec

        where = f"--log_with {self.log_with}"
        if self.log_with in ("tensorboard", "all") and not self.logging_dir:
            yield Problem(where, "needs --logging_dir")
        if self.log_with in ("wandb", "all") and find_spec("wandb") is None:
            yield Problem(where, "the package wandb is not installed", "Run: pip install wandb")


@dataclass(frozen=True, kw_only=True)
class ModelMetadataOptions(OptionGroup, title="metadata", resume="free"):
    """What saved .safetensors files say about the model."""

    metadata_title: str | None = opt(None, help="Title. Default: --output_name.")
    metadata_author: str | None = opt(None, help="Author.")
    metadata_description: str | None = opt(None, help="Description.")
    metadata_license: str | None = opt(None, help="Licence.")
    metadata_tags: str | None = opt(None, help="Tags, separated by commas.")
    metadata_usage_hint: str | None = opt(None, help="How the model is used best.")
    metadata_thumbnail: str | None = opt(None, path=True, help="Picture: a file, or a data: URL.")
    metadata_merged_from: str | None = opt(None, help="Models that this one was merged from.")
    metadata_trigger_phrase: str | None = opt(None, help="Words that call up what was trained.")
    metadata_preprocessor: str | None = opt(None, help="Preprocessing that images for the model need.")
    metadata_is_negative_embedding: str | None = opt(None, help="Whether an embedding is for negative prompts.")


@dataclass(frozen=True, kw_only=True)
class HubOptions(OptionGroup, title="hub", resume="free"):
    """Uploads to Hugging Face."""

    huggingface_repo_id: str | None = opt(None, help="Repository (user/name) that models are uploaded to.")
    huggingface_repo_type: str | None = opt(None, matters_when=_UPLOADS, help="Type of the repository. Default: model.")
    huggingface_path_in_repo: str | None = opt(None, matters_when=_UPLOADS, help="Folder inside the repository.")
    huggingface_token: str | None = opt(
        None,
        secret=True,
        matters_when=_UPLOADS,
        help="Token for Hugging Face; the variable HF_TOKEN keeps it out of process lists.",
    )
    huggingface_repo_visibility: str | None = opt(
        None, matters_when=_UPLOADS, help="`public`; anything else makes a new repository private."
    )
    save_state_to_huggingface: bool = opt(False, needs={"huggingface_repo_id": ()}, help="Upload states too.")
    async_upload: bool = opt(
        False, matters_when={"huggingface_repo_id": ()}, help="Upload while training goes on (not the last model)."
    )
