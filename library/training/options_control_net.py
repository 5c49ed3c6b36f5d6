"""Options of ControlNet training for Stable Cascade."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from library.errors import Problem
from library.models.cascade.control_names import FILTER, filter_params, is_folder_filter, untyped_problems
from library.models.cascade.options import TrainedStageCModelOptions
from library.option_groups import OptionGroup, opt
from library.training.checks import must_exist
from library.training.options_cascade import FROZEN_DROPOUT, StageCOptions

_FOLDER = "--conditioning_data_dir"
_WITH_CACHES: dict[str, tuple[str, ...]] = {
    "cache_latents_to_disk": (),
    "cache_text_encoder_outputs_to_disk": (),
    "cache_conditions_to_disk": (),
    "webdataset_path": (),
}


@dataclass(frozen=True, kw_only=True)
class ControlNetOptions(OptionGroup, title="ControlNet"):
    """The ControlNet that is trained, and what it looks at."""

    controlnet_filter: str | None = opt(
        None,
        metadata_key="ss_controlnet_filter",
        help="What the ControlNet sees of each picture: canny, inpaint, identity, sr_effnet, sr, folder (pictures in "
        "--conditioning_data_dir), a name of the official configuration files, or a class of your own, "
        "package.module:Class.",
    )
    controlnet_filter_params: tuple[str, ...] = opt(
        (),
        convert=filter_params,
        needs={"controlnet_filter": ()},
        help="Arguments of the filter, such as resize=null (canny) or p_outpaint=0.4 share=[0.1,0.5] (inpaint).",
    )
    controlnet_blocks: tuple[int, ...] = opt(
        (),
        at_least=0,
        help="Numbers of the residual blocks of stage C that are steered. Default: those of "
        "--controlnet_checkpoint_path, else 0 4 8 12 51 55 59 63 of 64, and alike with fewer.",
    )
    controlnet_bottleneck_mode: str | None = opt(
        None,
        choices=("effnet", "simple", "large"),
        metadata_key="ss_controlnet_bottleneck_mode",
        help="Backbone: effnet (EfficientNet, for pictures), simple (two convolutions, for small maps) or large (for "
        "latents). Default: that of --controlnet_checkpoint_path, else effnet.",
    )
    controlnet_checkpoint_path: str | None = opt(
        None, path=True, resume="free", help="ControlNet for stage C that training starts from."
    )
    controlnet_backbone_path: str | None = opt(
        None,
        path=True,
        resume="free",
        help="EfficientNet-V2-S that a new ControlNet with the effnet backbone starts from, such as one trained on "
        "ImageNet. Default: --effnet_checkpoint_path.",
    )
    cache_conditions_to_disk: bool = opt(
        False,
        resume="free",
        help="Keep what the filter finds in pictures (canny: edges, identity: faces) in a file beside each picture, "
        "<picture>_<size>_sc_control.npz, or in --cache_dir.",
    )

    @property
    def uses_folder(self) -> bool:
        """Whether the ControlNet sees ready pictures of a folder."""
        return is_folder_filter(self.controlnet_filter or "")

    def check(self) -> Iterator[Problem]:
        """Refuse filters that do not exist, and files that are not there."""
        if self.controlnet_filter is None:
            yield Problem(FILTER, "is required", "Name one, such as canny.")
        else:
            from library.models.cascade.control_choice import filter_problems

            yield from filter_problems(self.controlnet_filter, self.controlnet_filter_params)
        yield from must_exist("--controlnet_checkpoint_path", self.controlnet_checkpoint_path)
        yield from must_exist("--controlnet_backbone_path", self.controlnet_backbone_path)

    def warn(self) -> Iterator[Problem]:
        """Point out a backbone that is not used."""
        if self.controlnet_backbone_path:
            if self.controlnet_checkpoint_path:
                yield Problem("--controlnet_backbone_path", "has no effect with --controlnet_checkpoint_path")
            elif self.controlnet_bottleneck_mode not in (None, "effnet"):
                mode = self.controlnet_bottleneck_mode
                yield Problem("--controlnet_backbone_path", f"has no effect with --controlnet_bottleneck_mode {mode}")


@dataclass(frozen=True, kw_only=True)
class ControlNetTrainingOptions(
    StageCOptions,
    changes={
        "save_model_as": {"choices": ("ckpt", "safetensors"), "help": "Format of saved ControlNets."},
        "stage_c_dropout": FROZEN_DROPOUT,
        "cache_dir": {"matters_when": _WITH_CACHES},
    },
    leave_out=("use_safetensors", "fused_backward_pass"),
):
    """Everything that the script that trains ControlNets for stage C accepts."""

    model: TrainedStageCModelOptions = field(default_factory=TrainedStageCModelOptions)
    control_net: ControlNetOptions = field(default_factory=ControlNetOptions)

    tracker_name: ClassVar[str] = "stable_cascade_control_net"

    @property
    def drops_out(self) -> bool:
        """Whether stage C's own dropout works while the ControlNet trains."""
        return bool(self.model.stage_c_dropout)

    def check_together(self) -> Iterator[Problem]:
        """Yield what is wrong between groups."""
        yield from super().check_together()
        if name := self.control_net.controlnet_filter:
            yield from untyped_problems([name], self.given.get("controlnet_filter"))
        if self.optimizer.learning_rate == 0:
            yield Problem("--learning_rate", "0 trains nothing")
        if self.control_net.cache_conditions_to_disk and self.data.webdataset_streaming:
            yield Problem("--cache_conditions_to_disk", "cannot be combined with --webdataset_streaming")
        if self.data.dataset_class is not None:
            yield Problem("--dataset_class", "its batches hold nothing that a ControlNet could look at")
        yield from self._check_folder()

    def _check_folder(self) -> Iterator[Problem]:
        folder, data = self.control_net.uses_folder, self.data
        if folder and data.masked_loss:
            yield Problem("--masked_loss", f"cannot be combined with {FILTER} folder: one folder of pictures, one use")
        if folder and not (data.dataset_config or data.conditioning_data_dir):
            yield Problem(_FOLDER, f"is required by {FILTER} folder", "Give the folder of ready pictures.")

    def warn_together(self) -> Iterator[Problem]:
        """Yield what is suspicious between groups."""
        yield from super().warn_together()
        if self.distributed.sharing:
            what = "shares gradients only, as in the original trainer: each process has the whole model"
            yield Problem(self.distributed.sharing, what)
        if self.data.conditioning_data_dir and not self.control_net.uses_folder and self.control_net.controlnet_filter:
            yield Problem(_FOLDER, f"has no effect without {FILTER} folder")
