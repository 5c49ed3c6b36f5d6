"""All options of gen_img.py together, and the rules between their groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from library.errors import Problem
from library.files import check_writable_folder
from library.inference.options import (
    CheckpointOptions,
    NetworkUseOptions,
    NoiseExperimentOptions,
    PictureFileOptions,
    PromptSourceOptions,
    PromptTextOptions,
    SamplingOptions,
    SpeedOptions,
)
from library.inference.options_pictures import (
    ControlOptions,
    DeepShrinkOptions,
    GradualLatentOptions,
    HighresOptions,
    ImageInputOptions,
    SdxlSizeOptions,
)
from library.option_groups import OptionSet


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(OptionSet):
    """Everything about making pictures."""

    model: CheckpointOptions = field(default_factory=CheckpointOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    source: PromptSourceOptions = field(default_factory=PromptSourceOptions)
    files: PictureFileOptions = field(default_factory=PictureFileOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    text: PromptTextOptions = field(default_factory=PromptTextOptions)
    networks: NetworkUseOptions = field(default_factory=NetworkUseOptions)
    images: ImageInputOptions = field(default_factory=ImageInputOptions)
    highres: HighresOptions = field(default_factory=HighresOptions)
    shrink: DeepShrinkOptions = field(default_factory=DeepShrinkOptions)
    gradual: GradualLatentOptions = field(default_factory=GradualLatentOptions)
    control: ControlOptions = field(default_factory=ControlOptions)
    noise: NoiseExperimentOptions = field(default_factory=NoiseExperimentOptions)
    sizes: SdxlSizeOptions = field(default_factory=SdxlSizeOptions)

    def check_together(self) -> Iterator[Problem]:
        """A run needs prompts from somewhere, and a mask needs something to be a mask of."""
        source, images = self.source, self.images
        others = (source.from_file, source.from_module, source.interactive, images.image_path)
        if source.prompt is None and not any(others):
            hint = "Give --prompt, --from_file, --from_module, --interactive, or --image_path with pictures made here."
            yield Problem("", "there is no prompt", hint)
        if images.mask_path and not images.image_path and not self.networks.network_weights:
            what = "is a mask of --image_path, or of the regions of --network_weights, and there is neither"
            yield Problem("--mask_path", what)
        yield from self._check_regions()
        yield from check_processes()

    def _check_regions(self) -> Iterator[Problem]:
        """A network that is part of the model's weights acts everywhere."""
        networks, images = self.networks, self.images
        merged = networks.merged_count
        if not images.mask_path or not merged or merged < len(networks.network_weights):
            return
        option = "--network_merge" if networks.network_merge else "--network_merge_n_models"
        if not images.image_path:
            hint = f"Leave out {option}, or --mask_path."
            yield Problem("--mask_path", f"networks that {option} adds to the model have no regions", hint)

    def check_folders(self) -> Iterator[Problem]:
        """Make the folder for pictures and see that it can be written to."""
        return iter(check_writable_folder(self.files.outdir, f"--outdir {self.files.outdir}"))


def check_processes() -> Iterator[Problem]:
    """Each process would draw everything, all of them into the same files."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        hint = "Start it with python; for several GPUs once for each (CUDA_VISIBLE_DEVICES), with prompts of its own."
        yield Problem("", f"this script draws in one process, not in {processes}", hint)
