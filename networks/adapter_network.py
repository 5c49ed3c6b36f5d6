"""The network object: all adapters of a model, with everything that the trainer and others ask of a network."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.cascade_lora import CASCADE
from networks.adapter_base import Adapter, Region
from networks.adapter_files import load_into, read_weights
from networks.param_groups import PlusRatios, parameter_groups
from networks.targets import base_of

logger = logging.getLogger(__name__)

_BACKUP = "_weight_before_adapters"


class AdapterNetwork(nn.Module):
    """The adapters of a model, with everything that the trainer and the generation scripts ask a network for.

    Args:
        text_adapters: for layers of text encoders.
        unet_adapters: for layers of the U-Net.
        multiplier: strength of all of them.
        plus: LoRA+ ratios of learning rates.
    """

    def __init__(
        self,
        text_adapters: Sequence[Adapter],
        unet_adapters: Sequence[Adapter],
        *,
        multiplier: float = 1.0,
        plus: PlusRatios | None = None,
    ) -> None:
        super().__init__()
        self.text_adapters = list(text_adapters)
        self.unet_adapters = list(unet_adapters)
        self.plus = plus or PlusRatios()
        self.multiplier = multiplier
        self._trained: set[Tensor] | None = None
        self._idle: list[Adapter] = []
        # Of a state that is resumed, too: it may hold what a file once brought.
        self.register_load_state_dict_post_hook(lambda *_: self._wake())
        self.set_multiplier(multiplier)

    @property
    def adapters(self) -> list[Adapter]:
        """All adapters, those of text encoders first."""
        return [*self.text_adapters, *self.unet_adapters]

    @property
    def may_skip_parameters(self) -> bool:
        """Whether a trainable parameter may get no gradient in a step."""
        return any(adapter.may_skip_parameters for adapter in self.adapters)

    @property
    def uses_global_randomness(self) -> bool:
        """Whether a step draws from torch's global generator."""
        return any(adapter.uses_global_randomness for adapter in self.adapters)

    # Attaching ------------------------------------------------------------------------------------------------------

    def apply_to(
        self,
        text_encoder: Any,
        unet: Any,
        apply_text_encoder: bool = True,  # noqa: FBT001, FBT002 - the protocol's signature
        apply_unet: bool = True,  # noqa: FBT001, FBT002
    ) -> None:
        """Attach the adapters to their layers; adapters of a part that is not adapted are forgotten."""
        if not apply_text_encoder:
            self.text_adapters = []
        if not apply_unet:
            self.unet_adapters = []
        for adapter in self.adapters:
            adapter.attach()
            self.add_module(adapter.name, adapter)
        texts, unets = len(self.text_adapters), len(self.unet_adapters)
        main = "stage C" if base_of(self.unet_adapters) == CASCADE else "the U-Net"
        logger.info("network on %d layers of text encoders and %d of %s", texts, unets, main)

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength of all adapters."""
        self.multiplier = multiplier
        for adapter in self.adapters:
            vars(adapter)["multiplier"] = multiplier

    def set_enabled(self, is_enabled: bool) -> None:  # noqa: FBT001 - the protocol's signature
        """Switch the network off by taking the adapters out of their layers, or on again."""
        for adapter in self.adapters:
            if is_enabled:
                adapter.attach()
            else:
                adapter.detach()

    def limit_to(self, region: Region | None) -> None:
        """Let the network act in a part of the picture and on the words of that part only; None: everywhere."""
        for adapter in self.adapters:
            adapter.limit_to(region)

    # Training -------------------------------------------------------------------------------------------------------

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: the model's own checkpointing covers the adapters inside its blocks."""

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return parameter groups for the optimizer and a name for each.

        A rate of None stands for `default_lr`. What has no rate then, or 0, is not trained: such adapters stay in
        files, and keep working in the model if they change anything (after `--network_weights`).
        """
        text = default_lr if text_encoder_lr is None else text_encoder_lr
        groups = parameter_groups(self.text_adapters, "textencoder", text, self.plus.for_text)
        return self._with_unet_groups(groups, unet_lr, default_lr)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: Sequence[float] | float | None, unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """As `prepare_optimizer_params`, with a rate for each text encoder; a single one is for all of them."""
        rates = [] if text_encoder_lr is None else text_encoder_lr
        rates = list(rates) if isinstance(rates, Sequence) else [rates]
        encoders = sorted({adapter.encoder or 0 for adapter in self.text_adapters})
        if len(rates) <= 1 or len(encoders) <= 1:
            return self.prepare_optimizer_params(rates[0] if rates else None, unet_lr, default_lr)
        groups: list[tuple[str, dict[str, Any]]] = []
        for encoder in encoders:
            members = [adapter for adapter in self.text_adapters if adapter.encoder == encoder]
            rate = rates[min(encoder, len(rates) - 1)]
            groups += parameter_groups(members, f"textencoder {encoder + 1}", rate, self.plus.for_text)
        return self._with_unet_groups(groups, unet_lr, default_lr)

    def _with_unet_groups(
        self, groups: list[tuple[str, dict[str, Any]]], unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        rate = default_lr if unet_lr is None else unet_lr
        groups = [*groups, *parameter_groups(self.unet_adapters, "unet", rate, self.plus.for_unet)]
        self._trained = {parameter for _, group in groups for parameter in group["params"]}
        self._set_gradients()
        for adapter in self.adapters:
            if not any(parameter.requires_grad for parameter in adapter.parameters()) and adapter.is_idle():
                adapter.detach()
                self._idle.append(adapter)
        return [group for _, group in groups], [name for name, _ in groups]

    def _set_gradients(self) -> None:
        for parameter in self.parameters():
            parameter.requires_grad_(self._trained is None or parameter in self._trained)

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        """Let gradients reach what is trained."""
        self._set_gradients()

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        """Switch to training mode."""
        self.train()

    def get_trainable_params(self) -> list[nn.Parameter]:
        """Return the parameters that are trained."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def accumulate_in_place(self) -> None:
        """Let backward passes add to the gradients that are there, which must stay from now on.

        Not for several processes, which learn from autograd that a gradient is ready to be shared.
        """
        for adapter in self.adapters:
            adapter.accumulate_in_place()

    @property
    def limits_norms(self) -> bool:
        """Whether there is a limit of norms for adapters of this kind."""
        return any(type(adapter).limit_norm is not Adapter.limit_norm for adapter in self.adapters)

    @torch.no_grad()
    def limit_norms(self, max_norm: float) -> Tensor:
        """Scale every layer's change down to a norm of at most `max_norm`.

        Returns:
            [3] on the device, without waiting for it: number of layers changed, mean and maximum of the norms.
        """
        found = [pair for adapter in self.adapters if (pair := adapter.limit_norm(max_norm)) is not None]
        if not found:
            return torch.zeros(3)
        norms, changed = torch.stack(found).unbind(1)
        return torch.stack([changed.sum(), norms.mean(), norms.max()])

    def apply_max_norm_regularization(self, max_norm: float, device: Any = None) -> tuple[int, float, float]:
        """Do what `limit_norms` does; return (number of layers changed, mean norm, maximum norm)."""
        changed, mean, most = self.limit_norms(max_norm).tolist()
        return int(changed), mean, most

    # Files ----------------------------------------------------------------------------------------------------------

    def file_tensors(self) -> dict[str, Tensor]:
        """Return all tensors under their names in files."""
        return {
            f"{adapter.name}.{suffix}": tensor
            for adapter in self.adapters
            for suffix, tensor in adapter.file_tensors().items()
        }

    def save_weights(
        self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write the network to a file; see `library.checkpoints.lora_file.write_lora`."""
        from library.checkpoints.lora_file import write_lora

        write_lora(file, self.file_tensors(), metadata, precision=dtype)

    def load_weights(self, file: str | Path) -> str:
        """Start from the values of a file of any layout; layers that are not in it keep theirs.

        Returns:
            A sentence about what was found.

        Raises:
            UserError: the file is damaged, for another base model, does not fit, or has none of the layers.
        """
        found = read_weights(file, None, base_of(self.unet_adapters))
        summary = load_into({adapter.name: adapter for adapter in self.adapters}, found)
        self._wake()
        return summary

    def _wake(self) -> None:
        """Attach adapters again that were taken out because they changed nothing, and now do."""
        for adapter in [adapter for adapter in self._idle if not adapter.is_idle()]:
            adapter.attach()
            self._idle.remove(adapter)

    # Merging --------------------------------------------------------------------------------------------------------

    def is_mergeable(self) -> bool:
        """Whether `merge_to` can put the network into the model's weights."""
        return True

    @torch.no_grad()
    def merge_to(
        self,
        text_encoder: Any,
        unet: Any,
        weights_sd: Mapping[str, Tensor] | None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add the network to the weights of its layers, in float32, at its multiplier.

        Args:
            text_encoder: not used: the adapters know their layers.
            unet: not used.
            weights_sd: values of the network by their names in files; None: as they are.
            dtype: what the sums are rounded to; None: the type of the layer.
            device: where to compute; None: where the layer is.
        """
        if weights_sd is not None:
            found = read_weights("the network's weights", weights_sd, None)
            load_into({adapter.name: adapter for adapter in self.adapters}, found)
        for adapter, weight in self._weights():
            merged = adapter.merged(weight.to(device or weight.device), self.multiplier)
            weight.copy_(merged if dtype is None else merged.to(dtype))

    def _weights(self) -> Iterator[tuple[Adapter, Tensor]]:
        return ((adapter, adapter.layer.weight.data) for adapter in self.adapters)

    def backup_weights(self) -> None:
        """Remember the weights of the layers, once for all networks of a model, for `restore_weights`."""
        for adapter, weight in self._weights():
            vars(adapter.layer).setdefault(_BACKUP, weight.clone())

    def restore_weights(self) -> None:
        """Give the layers the weights that `backup_weights` remembered."""
        for adapter, weight in self._weights():
            if _BACKUP in vars(adapter.layer):
                weight.copy_(vars(adapter.layer)[_BACKUP])

    def pre_calculation(self) -> None:
        """Merge the network into the layers' weights and switch it off, so that a forward pass costs nothing more."""
        self.merge_to(None, None, None)
        self.set_enabled(False)
