"""Training a network (LoRA and its relatives) beside a model that stays as it is."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.checkpoints.lora_file import read_lora
from library.contracts import ParamGroup
from library.errors import UserError, raise_problems
from library.models.lycoris_args import float8_problems
from library.models.network_files import KohyaFile, load_network_weights, merge_networks
from library.models.network_module import argument_problems, calling, import_network_module, is_ours
from library.randomness import derive
from library.training.checks_network_files import value_problems
from library.training.network_files import save_network, try_saving
from library.training.network_metadata import network_metadata
from library.training.network_module import (
    PRESERVE,
    optimizer_groups,
    require_network,
    require_strength,
)
from library.training.network_norms import NetworkNorms

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

    from library.contracts import Batch, Condition, Noised
    from library.draws import Draws
    from library.models.family import ModelFamily
    from library.training.methods.companion import Companion
    from library.training.model_saves import Describe, RunFacts
    from library.training.options_network import NetworkTrainingOptions
    from library.training.run import Run
    from library.training.sampling import Renderer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NetworkPlan:
    """What is known of the network before a model is loaded.

    Attributes:
        module: the imported network module.
        opts: of the script.
        trains_text: whether the text encoder gets a network that is trained.
        adapts_text: whether the text encoder gets a network at all.
        companion: trains beside the network, through the text encoder.
    """

    module: ModuleType
    opts: NetworkTrainingOptions
    trains_text: bool
    adapts_text: bool
    companion: Companion | None = None

    @classmethod
    def of(cls, opts: NetworkTrainingOptions, companion: Companion | None = None) -> NetworkPlan:
        """Import the module, check its arguments, and look at every value of the files that it begins with.

        Raises:
            UserError: the module cannot be used or refuses its arguments, or a file is damaged.
        """
        network = opts.network
        name = network.network_module or ""
        module = import_network_module(name)
        dim = None if network.dim_from_weights else network.network_dim
        size = dim, network.network_alpha
        problems = [*argument_problems(name, module, size, network.arguments, opts.family_name)]
        if opts.precision.fp8_base or network.fp8_base_unet:
            problems += float8_problems(name, network.arguments)
        raise_problems([*problems, *value_problems(opts)])
        covers = network.trains_text_encoder and not getattr(module, "UNET_ONLY", False)
        rates = network.text_encoder_lr or (opts.optimizer.learning_rate,)
        trains = covers and any(rate > 0 for rate in rates)
        adapts = trains or (covers and network.network_weights is not None)
        return cls(module, opts, trains, adapts, companion)

    @property
    def text_changes(self) -> bool:
        """Whether what captions become changes during the run, or differs from what the bare model makes of them."""
        return self.adapts_text or self.companion is not None

    @property
    def text_learns(self) -> bool:
        """Whether gradients have to pass through the text encoder."""
        return self.trains_text or self.companion is not None

    def prepare(self, family: ModelFamily) -> None:
        """Change the model in memory as the options ask, before anything of it is cached."""
        merge_networks(family, self.opts.network.base_networks, "--base_weights")
        precision = self.opts.precision
        if precision.fp8_base or self.opts.network.fp8_base_unet:
            family.store_in_float8(("unet", "text_encoder") if precision.fp8_base else ("unet",))


class Adapter:
    """Trains a network on the denoiser and the text encoders; see `library.training.methods.base.Method`."""

    light = True

    def __init__(self, run: Run, family: ModelFamily, plan: NetworkPlan) -> None:
        self.run = run
        self.family = family
        self.plan = plan
        self.opts = plan.opts
        self.device, self.dtype, self.seed = run.device, run.trained_dtype, run.seed
        self.companion = plan.companion
        self.saved_beside = () if self.companion is None else self.companion.saved_beside
        self.network: Any = None
        self.may_skip_parameters = False
        self.uses_global_randomness = False
        self.flat_parameters = False
        self._epoch = -1
        self._multiplier = 1.0
        self._norms: NetworkNorms
        self._beside: dict[str, nn.Module] = {}
        self._drops_out = plan.opts.drops_out

    # Before training ---------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Create the network, attach it to the model, and load what it starts from."""
        options = self.opts.network
        for part in self.family.parts().values():
            part.requires_grad_(False).eval()
        # A function of the seed alone, whatever was drawn before.
        torch.manual_seed(derive(self.seed, "init", "network"))
        if self.companion is not None:
            self._beside = {self.companion.name: self.companion.attach(self.family, self.seed).to(self.device)}
        network = self.network = self._create()
        require_strength(network, self._name, self.run.data.specs)
        if hasattr(network, "prepare_network"):
            with calling(self._name, "prepare_network"):
                # As modules know the options: all in one place, by name.
                network.prepare_network(Namespace(**self.opts.values()))
        with calling(self._name, "apply_to"):
            network.apply_to(self._text_encoder, self.family.denoiser, self.plan.adapts_text, options.trains_unet)
        if next(network.parameters(), None) is None:
            raise UserError("finds no layer of the model that it could be attached to", where=self._where)
        if options.network_weights:
            with calling(self._name, "load_weights"):
                foreign = not options.is_known_module
                load_network_weights(network, options.network_weights, self.family.spec.name, foreign=foreign)
            if self.companion is not None and not foreign:
                file = read_lora(options.network_weights, base=self.family.spec.name)
                self.companion.load(file.bundled, f"--network_weights {options.network_weights}")
        network.to(device=self.device, dtype=self.dtype)
        # Modules of ours say what they do; of others nothing is known.
        self.may_skip_parameters = bool(getattr(network, "may_skip_parameters", True))
        self.uses_global_randomness = self._drops_out or bool(getattr(network, "uses_global_randomness", True))
        self.flat_parameters = not self.may_skip_parameters
        self._enable_checkpointing()
        if not is_ours(self._name):
            with calling(self._name, "save_weights"):
                try_saving(network)
        self._norms = NetworkNorms(network, options.scale_weight_norms, self.device)
        if self._norms.limit_is_idle:
            logger.warning("--scale_weight_norms has no effect: %s cannot scale its weights", options.network_module)
        self.train_mode()

    def _create(self) -> Any:
        options, module = self.opts.network, self.plan.module
        rest = (None, self._text_encoder, self.family.denoiser)
        arguments = options.arguments
        function = "create_network_from_weights" if options.dim_from_weights else "create_network"
        with calling(self._name, function), ExitStack() as stack:
            if not options.dim_from_weights:
                made = module.create_network(
                    1.0,
                    options.network_dim,
                    options.network_alpha,
                    *rest,
                    neuron_dropout=options.network_dropout,
                    **arguments,
                )
            else:
                file = KohyaFile(
                    str(options.network_weights),
                    self.family.spec.name,
                    "--network_weights",
                    foreign=not options.is_known_module,
                )
                path = str(stack.enter_context(file))
                made, _ = module.create_network_from_weights(1.0, path, *rest, **arguments)
        return require_network(made, self._name)

    def _enable_checkpointing(self) -> None:
        if not self.opts.memory.gradient_checkpointing:
            return
        self.family.enable_gradient_checkpointing(
            preserve_rng_state=self.uses_global_randomness, offload=self.opts.network.cpu_offload_checkpointing
        )
        if hasattr(self.network, "enable_gradient_checkpointing"):
            self.network.enable_gradient_checkpointing()

    @property
    def _name(self) -> str:
        return self.opts.network.network_module or ""

    @property
    def _where(self) -> str:
        return f"--network_module {self._name}"

    @property
    def _text_encoder(self) -> Any:
        """One text encoder as it is, several as a list: modules choose their names by that."""
        encoders = self.family.text_encoders
        return encoders[0] if len(encoders) == 1 else list(encoders)

    def parts(self) -> dict[str, nn.Module]:
        """Return the network, and what trains beside it."""
        return {"network": self.network, **self._beside}

    def trainable(self) -> nn.ModuleDict:
        """Return the network, and what trains beside it."""
        return nn.ModuleDict(self.parts())

    def param_groups(self) -> list[ParamGroup]:
        """Return the groups that the network itself makes."""
        options, rate = self.opts.network, self.opts.optimizer.learning_rate
        with calling(self._name, "prepare_optimizer_params"):
            groups, names = optimizer_groups(self.network, options.text_encoder_lr, options.unet_lr, rate)
        if hasattr(self.network, "prepare_grad_etc"):
            with calling(self._name, "prepare_grad_etc"):
                self.network.prepare_grad_etc(self._text_encoder, self.family.denoiser)
        self._freeze_unused()
        if not groups:
            raise UserError("has nothing to train with these learning rates", where=self._where)
        made = []
        for group, name in zip(groups, names, strict=True):
            settings = {key: value for key, value in group.items() if key not in ("params", "lr")}
            given = group.get("lr")
            made.append(ParamGroup(name, tuple(group["params"]), rate if given is None else float(given), settings))
        return made if self.companion is None else [*made, *self.companion.param_groups(rate)]

    def _freeze_unused(self) -> None:
        """Let adapters of layers that `--clip_skip` leaves out need no gradient, since they will never get one."""
        unused = {id(parameter) for parameter in self.family.unused_parameters()}
        for adapter in getattr(self.network, "adapters", ()):
            if id(getattr(getattr(adapter, "layer", None), "weight", None)) in unused:
                adapter.requires_grad_(False)

    # In training ---------------------------------------------------------------------------------------------------

    def accumulate_in_place(self) -> None:
        """Tell networks of ours that gradients are rows that stay."""
        if hasattr(self.network, "accumulate_in_place"):
            self.network.accumulate_in_place()

    def train_mode(self) -> None:
        """Training mode for the network; the model stays in evaluation mode unless its own dropout is wanted."""
        self.network.train()
        self.family.denoiser.train(self._drops_out)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, and full strength whatever the data set of the last batch asked for."""
        before = self._multiplier
        self._set_multiplier(1.0)
        self.network.eval()
        self.family.denoiser.eval()
        try:
            yield
        finally:
            self.train_mode()
            self._set_multiplier(before)

    def enter_step(self, step: int) -> bool:
        """Nothing stops training during the run."""
        return False

    def before_micro_step(self, batch: Batch) -> None:
        """Tell the network that an epoch or a micro-batch begins."""
        network = self.network
        if batch.key.epoch != self._epoch:
            self._epoch = batch.key.epoch
            if hasattr(network, "on_epoch_start"):
                network.on_epoch_start(self._text_encoder, self.family.denoiser)
        if hasattr(network, "on_step_start"):
            network.on_step_start(self._text_encoder, self.family.denoiser)

    def condition(self, batch: Batch, draws: Draws) -> Condition:
        """Encode the captions, with gradients only if something on the text encoder trains."""
        self._set_multiplier(batch.network_multiplier)
        with self._running(), torch.set_grad_enabled(self.plan.text_learns and torch.is_grad_enabled()):
            return self.family.condition(batch, draws)

    def predict(self, noised: Noised, condition: Condition, batch: Batch) -> Tensor:
        """Run the denoiser with the network."""
        with self._running():
            return self.family.denoise(noised.noisy, noised.t, condition)

    def _running(self) -> AbstractContextManager[None]:
        """Context of a forward pass through the network."""
        return nullcontext() if is_ours(self._name) else calling(self._name, "forward pass")

    def target(self, noised: Noised, condition: Condition, batch: Batch) -> Tensor:
        """Return the objective's target; for images whose output is to be preserved, what the bare model predicts."""
        rows = [row for row, attributes in enumerate(batch.custom_attributes) if attributes.get(PRESERVE)]
        if not rows:
            return noised.target
        with torch.no_grad(), self._bare():
            if self.plan.adapts_text:
                condition = self.family.encode_text(batch.token_ids, batch.token_weights)
            pooled = None if condition.pooled is None else _rows(condition.pooled, rows)
            extra = {name: _rows(tensor, rows) for name, tensor in condition.extra.items()}
            chosen = replace(condition, hidden=_rows(condition.hidden, rows), pooled=pooled, extra=extra)
            preserved = self.family.denoise(_rows(noised.noisy, rows), _rows(noised.t, rows), chosen)
        target = list(noised.target)
        for row, wanted in zip(rows, preserved, strict=True):
            target[row] = wanted.to(noised.target.dtype)
        return torch.stack(target)

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """The model without the network."""
        before = self._multiplier
        self._set_multiplier(0.0)
        try:
            yield
        finally:
            self._set_multiplier(before)

    def _set_multiplier(self, multiplier: float) -> None:
        if multiplier == self._multiplier:
            return
        self.network.set_multiplier(multiplier)
        self._multiplier = multiplier

    def see_gradients(self) -> None:
        """Let a network that reports norms look at the gradients."""
        self._norms.see_gradients()

    def after_update(self, step: int) -> None:
        """Keep the weights' norms below `--scale_weight_norms`."""
        self._norms.after_update()

    def scalars(self) -> dict[str, Tensor | float]:
        """Return what the last update says about the network, to be drawn beside the loss."""
        return self._norms.scalars()

    def samples(self, renderer: Renderer) -> Renderer:
        """Return the renderer: the network is attached to the model."""
        return renderer

    # Saving --------------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """Format of saved networks."""
        saves = self.opts.save
        return "safetensors" if saves.use_safetensors else saves.save_model_as or "safetensors"

    def parameter_count(self) -> int:
        """Return the number of values that a saved network has."""
        return sum(tensor.numel() for part in self.parts().values() for tensor in part.state_dict().values())

    def describe(self, facts: RunFacts) -> Describe:
        """Return what makes the metadata of the networks of a run; a thread begins to hash the base model."""
        return network_metadata(
            self.opts, family=facts.spec, data=facts.data, built=facts.built, length=facts.length, seed=facts.seed
        )

    def save(
        self, target: Path, kind: str, precision: torch.dtype | None, metadata: dict[str, str], *, epoch: int, step: int
    ) -> Path:
        """Write the network for use and return its path; `target` has no suffix."""
        path, companion = target.with_name(f"{target.name}.{kind}"), self.companion
        if companion is not None:
            metadata = {**metadata, **companion.metadata()}
        with calling(self._name, "save_weights"):
            extra = None if companion is None else companion.file_tensors()
            save_network(self.network, path, precision, metadata, extra=extra)
        if companion is not None:
            companion.save_beside(path, precision, metadata)
        return path


def _rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Return some rows of a tensor; an index made of a list would have to be sent to the device first."""
    return tensor if len(rows) == len(tensor) else torch.stack([tensor[row] for row in rows])
