"""Full fine-tuning of the denoiser and, unless it is switched off or stopped, of the text encoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.checkpoints.parameter_order import in_reference_order
from library.checkpoints.save import save_kind
from library.contracts import ParamGroup
from library.models.memory import has_dropout
from library.training.methods.base import PlainMethod
from library.training.model_saves import model_metadata

if TYPE_CHECKING:
    from library.contracts import Batch, Condition
    from library.draws import Draws
    from library.models.family import ModelFamily
    from library.training.model_saves import Describe, RunFacts
    from library.training.options_full import FullTrainingOptions


_GROUPS = {"unet": "unet", "text_encoder": "text_encoder1"}
"""What the learning rates of the parts are logged as."""


class FullTune(PlainMethod):
    """Trains all weights of the family's denoiser and, until the stop, those of its text encoders."""

    def __init__(self, family: ModelFamily, opts: FullTrainingOptions) -> None:
        self.family = family
        self.tune = opts.tune
        self.saved_beside = family.saved_beside
        self.learning_rate = opts.optimizer.learning_rate
        self.memory, self.saves = opts.memory, opts.save
        self.zero_terminal_snr = opts.noise.zero_terminal_snr
        self.stop_step = opts.tune.text_encoder_stop
        self.trains_text = opts.tune.trains_text_encoder
        self.text_active = self.trains_text
        self.uses_global_randomness = False

    def attach(self) -> None:
        """Set gradients and modes, and switch checkpointing on."""
        for name, part in self.family.parts().items():
            part.requires_grad_(name in self.tune.trained_parts)
        for parameter in self.family.unused_parameters():
            parameter.requires_grad_(False)
        if self.memory.gradient_checkpointing:
            self.family.enable_gradient_checkpointing()
        self.uses_global_randomness = has_dropout(*self.parts().values())
        self.train_mode()

    def parts(self) -> dict[str, nn.Module]:
        """Return what is trained at any time of the run: the denoiser, the text encoder or both."""
        return {name: part for name, part in self.family.parts().items() if name in self.tune.trained_parts}

    def trainable(self) -> nn.ModuleDict:
        """Return what trains now: without the text encoder once it has stopped."""
        return nn.ModuleDict({name: part for name, part in self.parts().items() if name == "unet" or self.text_active})

    def train_mode(self) -> None:
        """Training mode for what trains; frozen parts stay in evaluation mode."""
        for name, part in self.family.parts().items():
            part.train(name in self.tune.trained_parts and (name == "unet" or self.text_active))

    def param_groups(self) -> list[ParamGroup]:
        """One group, or with a rate of its own for the text encoder one for each of denoiser and text encoder."""
        parameters = {name: tuple(p for _, p in in_reference_order(part)) for name, part in self.parts().items()}
        rate_te = self.tune.text_encoder_rate
        if rate_te is None or not self.trains_text:
            together = tuple(parameter for part in parameters.values() for parameter in part)
            return [ParamGroup(_GROUPS[next(iter(parameters))], together, self.learning_rate)]
        rates = {"unet": self.learning_rate, "text_encoder": rate_te}
        return [ParamGroup(_GROUPS[name], params, rates[name]) for name, params in parameters.items()]

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

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode for all parts, and back."""
        modes = {module: module.training for part in self.parts().values() for module in part.modules()}
        try:
            for part in self.parts().values():
                part.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    @property
    def kind(self) -> str:
        """Format of saved models: that of the source unless the user chose one."""
        return save_kind(self.saves.save_model_as, self.saves.use_safetensors, self.family.source_kind)

    def parameter_count(self) -> int:
        """Return the number of values that a saved model has."""
        return self.family.parameter_count()

    def describe(self, facts: RunFacts) -> Describe:
        """Return what makes the metadata of the models of a run."""
        return model_metadata(facts)

    def save(
        self, target: Path, kind: str, precision: torch.dtype | None, metadata: dict[str, str], *, epoch: int, step: int
    ) -> Path:
        """Write the whole model for use and return its path; `target` has no suffix."""
        return self.family.save(
            target, kind, precision, metadata, epoch=epoch, step=step, zero_terminal_snr=self.zero_terminal_snr
        )
