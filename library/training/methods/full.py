"""Full fine-tuning of the denoiser and, unless it is switched off or stopped, of the text encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from library.contracts import ParamGroup
from library.models.memory import has_dropout
from library.training.parameter_order import in_reference_order

if TYPE_CHECKING:
    from torch import Tensor

    from library.contracts import Batch, Condition, Noised
    from library.draws import Draws
    from library.models.family import ModelFamily
    from library.models.options import MemoryOptions
    from library.training.options import FullTuneOptions


def trained_parts(tune: FullTuneOptions) -> tuple[str, ...]:
    """Return the names of the family's parts that train at any time of the run."""
    stop = tune.stop_text_encoder_training
    return ("unet", "text_encoder") if stop is None or stop >= 0 else ("unet",)


class FullTune:
    """Trains all weights of the family's denoiser and, until the stop, those of its text encoders."""

    may_skip_parameters = False

    def __init__(
        self, family: ModelFamily, tune: FullTuneOptions, memory: MemoryOptions, *, learning_rate: float
    ) -> None:
        self.family = family
        self.tune = tune
        self.learning_rate = learning_rate
        self.memory = memory
        self.stop_step = tune.stop_text_encoder_training
        self.trains_text = "text_encoder" in trained_parts(tune)
        self.text_active = self.trains_text
        self.uses_global_randomness = False

    def attach(self) -> None:
        """Set gradients and modes, and switch checkpointing on."""
        for name, part in self.family.parts().items():
            part.requires_grad_(name == "unet" or self.trains_text)
        for parameter in self.family.unused_parameters():
            parameter.requires_grad_(False)
        if self.memory.gradient_checkpointing:
            self.family.enable_gradient_checkpointing()
        self.uses_global_randomness = has_dropout(*self.parts().values())
        self.train_mode()

    def parts(self) -> dict[str, nn.Module]:
        """Return the denoiser and, when it is trained at any time of the run, the text encoder."""
        return {name: part for name, part in self.family.parts().items() if name == "unet" or self.trains_text}

    def trainable(self) -> nn.ModuleDict:
        """Return what trains now: without the text encoder once it has stopped."""
        return nn.ModuleDict({name: part for name, part in self.parts().items() if name == "unet" or self.text_active})

    def train_mode(self) -> None:
        """Training mode for what trains; frozen parts stay in evaluation mode."""
        for name, part in self.family.parts().items():
            part.train(name == "unet" or self.text_active)

    def param_groups(self) -> list[ParamGroup]:
        """One group, or with `--learning_rate_te` one for each of denoiser and text encoder."""
        parameters = {name: tuple(p for _, p in in_reference_order(part)) for name, part in self.parts().items()}
        rate_te = self.tune.learning_rate_te
        if rate_te is None or not self.trains_text:
            together = tuple(parameter for part in parameters.values() for parameter in part)
            return [ParamGroup("unet", together, self.learning_rate)]
        names = {"unet": ("unet", self.learning_rate), "text_encoder": ("text_encoder1", rate_te)}
        return [ParamGroup(names[name][0], params, names[name][1]) for name, params in parameters.items()]

    def enter_step(self, step: int) -> bool:
        """Freeze the text encoder when `--stop_text_encoder_training` updates are done."""
        if not self.text_active or self.stop_step is None or step < self.stop_step:
            return False
        self.text_active = False
        for encoder in self.family.text_encoders:
            encoder.requires_grad_(False)
            encoder.zero_grad(set_to_none=True)
            encoder.eval()
        return True

    def condition(self, batch: Batch, draws: Draws) -> Condition:
        """Encode the captions, with gradients only while the text encoder trains."""
        with torch.set_grad_enabled(self.text_active and torch.is_grad_enabled()):
            return self.family.condition(batch, draws)

    def predict(self, noised: Noised, condition: Condition, batch: Batch) -> Tensor:
        """Run the denoiser."""
        return self.family.denoise(noised.noisy, noised.t, condition)

    def target(self, noised: Noised, condition: Condition, batch: Batch) -> Tensor:
        """Return the objective's own target."""
        return noised.target

    def after_update(self, step: int) -> None:
        """Nothing to do: full fine-tuning has no constraint on its weights."""
