"""Prompts of several parts, written with ` AND ` between them, and networks that act in a part of the picture.

Without regions the parts are composed: what each adds to the prediction without guidance is summed ("Compositional
Visual Generation with Composable Diffusion Models", https://arxiv.org/abs/2206.01714, equation 11, with weights of 1).

With a picture of regions (`--mask_path`) each part holds in a region of its own: cross attention reads every part, and
each place of the picture takes the answers of the parts that hold there, averaged. The network of the same number acts
in the same region, and on the words of its part. Networks leave the negative prompt's words alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.errors import UserError
from library.inference.extensions import DenoiserInput, Extension, StepHooks
from library.inference.prompt_text import split_parts
from library.inference.regions import Regions, region_masks

if TYPE_CHECKING:
    from library.contracts import Condition
    from library.inference.extensions import BatchContext, Moment, PictureInputs
    from library.inference.prompts import PromptRequest


class RegionalPrompts(Extension):
    """Draws prompts of several parts.

    Args:
        networks: those attached to the model, in order; the first belongs to the first part.
        colour_codes: how many regions are told by colours, as `regions.region_masks` says; None: by channels.
    """

    def __init__(self, networks: Sequence[Any] = (), *, colour_codes: int | None = None) -> None:
        self._networks = tuple(networks)
        self._colour_codes = colour_codes

    def prompt(self, request: PromptRequest, text: str) -> str:
        """Return the longest part: it is encoded first, the others follow."""
        return max(split_parts(text), key=len)

    def batch_key(self, request: PromptRequest, inputs: PictureInputs) -> tuple[object, ...]:
        """Return the number of parts, whether there are regions, and the texts where several are encoded together.

        They are filled to the length of the longest, so other texts in the batch would change a picture.

        Raises:
            UserError: there are more networks than parts, or networks that cannot be limited to a region.
        """
        parts = len(split_parts(request.prompt))
        if inputs.regions is not None:
            self._check_networks(parts, request.where)
        regional = inputs.regions is not None
        texts = (request.prompt, request.negative_prompt) if regional or parts > 1 else ()
        return parts, regional, texts

    def _check_networks(self, parts: int, where: str) -> None:
        if len(self._networks) > parts:
            what = f"{len(self._networks)} networks with regions for {parts} parts of the prompt"
            raise UserError(what, "Write as many parts, with AND between them, or leave out --mask_path.", where=where)
        for number, network in enumerate(self._networks, start=1):
            if not hasattr(network, "limit_to"):
                what = f"network {number} ({type(network).__module__}) cannot be limited to a region"
                hint = "Networks of networks.lora, loha, lokr, oft and the like can be; or leave out --mask_path."
                raise UserError(what, hint, where=where)

    @contextmanager
    def begin(self, batch: BatchContext) -> Iterator[StepHooks]:
        """Encode the parts; with regions, limit networks and hook cross attention."""
        parts = [split_parts(request.prompt) for request in batch.requests]
        if batch.inputs[0].regions is not None:
            with self._in_regions(batch, parts) as hooks:
                yield hooks
        elif len(parts[0]) > 1:
            yield _Composed(batch, parts)
        else:
            yield StepHooks()

    @contextmanager
    def _in_regions(self, batch: BatchContext, parts: Sequence[list[str]]) -> Iterator[StepHooks]:
        size_wh = batch.requests[0].width, batch.requests[0].height
        masks = [
            region_masks(inputs.regions, len(parts[0]), size_wh, self._colour_codes)
            for inputs in batch.inputs
            if inputs.regions is not None
        ]
        regions = Regions(torch.stack(masks, dim=1).to(batch.device))
        with ExitStack() as stack:
            for number, network in enumerate(self._networks):
                stack.callback(network.limit_to, None)
                network.limit_to(partial(regions.share, number))
            hooks = _InRegions(batch, parts, regions)
            for name, module in batch.family.denoiser.named_modules():
                if name.endswith(".attn2"):
                    stack.enter_context(hooks.attending(module))
            yield hooks


class _Composed(StepHooks):
    """Sums what the parts of a prompt add to the prediction without guidance."""

    def __init__(self, batch: BatchContext, parts: Sequence[list[str]]) -> None:
        self._rows, self._branches = len(parts), batch.branches
        others = [_without_longest(texts) for texts in parts]
        self._others = [batch.encode(texts, None) for texts in zip(*others, strict=True)]

    def predict(self, moment: Moment, call: DenoiserInput, predict: Callable[[DenoiserInput], Tensor]) -> Tensor:
        """Return the prediction whose last rows, those of the prompts, stand for all parts."""
        rows = self._rows
        result = predict(call)
        of_parts = [result[-rows:]]
        for condition in self._others:
            of_parts.append(predict(DenoiserInput(call.noisy[-rows:], call.t[-rows:], condition)))
        if self._branches == 1:
            # Without guidance there is nothing that a part is measured from.
            return torch.stack(of_parts).mean(0)
        plain = result[:rows]
        total = plain + sum(part - plain for part in of_parts)
        return torch.cat([result[:-rows], total])


def _without_longest(parts: Sequence[str]) -> list[str]:
    longest = max(range(len(parts)), key=lambda place: len(parts[place]))
    return [part for place, part in enumerate(parts) if place != longest]


class _InRegions(StepHooks):
    """Gives every place of the picture the answers of the parts that hold there."""

    def __init__(self, batch: BatchContext, parts: Sequence[list[str]], regions: Regions) -> None:
        self._rows, self._regions = len(parts), regions
        requests = batch.requests
        # What reads the condition past cross attention, as ControlNets do, gets all parts in one prompt.
        prompts = [", ".join(texts) for texts in parts]
        negative = [request.negative_prompt for request in requests] if batch.branches > 1 else []
        empty = [""] * len(requests) if batch.branches > 2 else []
        self._condition: Condition = batch.encode([*empty, *negative, *prompts], None)
        self._texts: list[Tensor] = []
        for number in range(len(parts[0])):
            with regions.reading(number):
                self._texts.append(batch.encode([texts[number] for texts in parts], None).hidden)

    def predict(self, moment: Moment, call: DenoiserInput, predict: Callable[[DenoiserInput], Tensor]) -> Tensor:
        """Predict with the conditions that no network has changed; cross attention looks up those of the parts."""
        return predict(DenoiserInput(call.noisy, call.t, self._condition))

    @contextmanager
    def attending(self, attention: Any) -> Iterator[None]:
        """Let a cross attention layer read the parts, until the end of the context."""
        had, usual = "forward" in vars(attention), attention.forward
        vars(attention)["forward"] = partial(self._attend, usual)
        try:
            yield
        finally:
            if had:
                vars(attention)["forward"] = usual
            else:
                vars(attention).pop("forward")

    def _attend(
        self, usual: Callable[..., Tensor], hidden_states: Tensor, encoder_hidden_states: Tensor, **more: Any
    ) -> Tensor:
        rows, more = self._rows, {name: value for name, value in more.items() if value is not None}
        results = []
        if len(hidden_states) > rows:
            results.append(usual(hidden_states[:-rows], encoder_hidden_states=encoder_hidden_states[:-rows], **more))
        places = hidden_states[-rows:]
        mixed: Tensor | None = None
        for number, (text, weight) in enumerate(zip(self._texts, self._regions.weights(places), strict=True)):
            with self._regions.reading(number):
                answer = usual(places, encoder_hidden_states=text.to(encoder_hidden_states.dtype), **more)
            answer = answer * weight.to(answer.dtype)
            mixed = answer if mixed is None else mixed + answer
        if mixed is not None:
            results.append(mixed)
        return torch.cat(results)
