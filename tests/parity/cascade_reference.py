"""Training of Stable Cascade written a second time, plainly: networks of diffusers and transformers, all else by hand.

Only the random numbers come from the toolkit (`library.draws`), since a step cannot be repeated without them. Pictures
and captions are read from their files again, EfficientNet is a function of its tensors, and stages keep diffusers'
names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from library.contracts import Batch
from library.draws import Draws
from library.models.random_cascade import CascadeFiles
from tests.conftest import PHOTOS
from tests.parity.cascade_reference_models import effnet_latents, make_stage_a, make_vision

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a training is to do, named like the options; `rates` are for names that begin alike."""

    seed: int
    rates: Mapping[str, float]
    adaptive_loss_weight: bool = False
    min_snr_gamma: float = 0.0
    debiased_estimation_loss: bool = False
    noise_offset: float = 0.0
    min_timestep: int = 0
    max_timestep: int = 1000
    clip_image_cond_rate: float = 0.0
    effnet_dropout_rate: float = 0.1
    gradient_accumulation_steps: int = 1
    lr_warmup_steps: int = 1
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.8, 0.9)
    eps: float = 1e-3
    weight_decay: float = 0.1

    @property
    def argv(self) -> str:
        """The options of AdamW. Its epsilon is so large that rounding errors of tiny gradients stay tiny."""
        return f"--optimizer_args betas={self.betas[0]},{self.betas[1]} eps={self.eps} weight_decay={self.weight_decay}"


def write_pictures(folder: Path, captions: Mapping[str, str], size: tuple[int, int]) -> None:
    """Write photographs of a size that nothing has to change, with captions."""
    folder.mkdir(parents=True)
    for name, caption in captions.items():
        target = folder / f"{name.replace('/', '_')}.png"
        with Image.open(PHOTOS / f"{name}.jpg") as photo:
            photo.convert("RGB").resize(size).save(target)
        target.with_suffix(".caption").write_text(caption)


def read_pixels(path: Path) -> Tensor:
    """The picture in [0,1], [3,H,W]."""
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1) / 255


# Formulas ------------------------------------------------------------------------------------------------------------

S = 0.008
AT_ZERO = math.cos(S / (1 + S) * math.pi / 2) ** 2


def log_snr(t: Tensor) -> Tensor:
    signal = (torch.cos((S + t) / (1 + S) * (math.pi / 2)) ** 2 / AT_ZERO).clamp(0.0001, 0.9999)
    return torch.log(signal / (1 - signal))


def told_time(level: Tensor) -> Tensor:
    return (torch.acos((level.sigmoid() * AT_ZERO).sqrt()) / (math.pi / 2) * (1 + S) - S).clamp(0, 1)


def noised(clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    signal = (1 / (1 + torch.exp(-level.double()))).view(-1, 1, 1, 1)
    return (signal.sqrt() * clean + (1 - signal).sqrt() * noise).float()


def pyramid(noise: Tensor, draws: Draws) -> Tensor:
    """Noise of stage B: Gaussian noise, and coarse noise of at most 16 pixels to a side, of unit variance together."""
    channels, height, width = noise.shape[1:]
    total, power = noise, 1.0
    for level in range(1, 10):
        strength, size = 0.75**level, (height // 2**level, width // 2**level)
        if min(size) <= 16:
            coarse = draws.normal(f"pyramid_{level}", (channels, *size))
            total = total + strength * functional.interpolate(coarse, size=(height, width), mode="nearest")
            power += strength**2
        if min(size) == 1:
            break
    return total / math.sqrt(power)


# Training ------------------------------------------------------------------------------------------------------------


@dataclass
class Trainer:
    """Repeats a training: `values` are what trains, by the names in files; hooks and modules refer to them.

    Pictures are found by their names somewhere below `photos`.
    """

    files: CascadeFiles
    photos: Path
    stage: nn.Module
    text: nn.Module
    recipe: Recipe
    values: dict[str, Tensor]
    words: Mapping[str, int] = field(default_factory=dict)
    guide: Callable[[Tensor], None] | None = None

    def __post_init__(self) -> None:
        from transformers import CLIPTokenizer

        vocabulary = Path(__file__).parents[2] / "library" / "assets" / "clip_vocab"
        self.tokenizer = CLIPTokenizer(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"))
        self.effnet = load_file(self.files.effnet)
        self.stage_b = self.stage.config.effnet_in_channels is not None
        self.stage_a = make_stage_a(self.files.stage_a) if self.stage_b else None
        self.vision = make_vision(self.files.vision) if self.recipe.clip_image_cond_rate else None
        self.pixels = {path.name: read_pixels(path) for path in self.photos.rglob("*.png")}
        self.moments = {name: (torch.zeros_like(v), torch.zeros_like(v)) for name, v in self.values.items()}
        self.bucket_losses = [1.0] * 300
        self.observed: dict[int, list[float]] = {}
        for model in (self.stage, self.text):
            model.requires_grad_(False)
        for value in self.values.values():
            value.requires_grad_(True)

    def encode_text(self, captions: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """(States of the last layer before the final norm, pooled vector); padding is hidden by a mask."""
        rows = [self.ids(caption) for caption in captions]
        ids = torch.tensor([[*row, *[49407] * (77 - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (77 - len(row)) for row in rows])
        made = self.text(ids, attention_mask=mask, output_hidden_states=True)
        return made.hidden_states[-1], made.text_embeds[:, None]

    def ids(self, caption: str) -> list[int]:
        found: list[int] = []
        rest = caption
        for word, number in self.words.items():
            before, seen, rest = rest.partition(word)
            found += self.tokenizer(before, add_special_tokens=False).input_ids + [number] * bool(seen)
        return [49406, *found, *self.tokenizer(rest, add_special_tokens=False).input_ids][:76] + [49407]

    def conditions(self, batch: Batch, pixels: Tensor, draws: Draws) -> dict[str, Tensor]:
        hidden, pooled = self.encode_text(batch.captions)
        if self.stage_b:
            factor = 0.5 + 0.5 * draws.scalar("effnet_size")
            size = [int(side * factor) // 32 * 32 for side in pixels.shape[-2:]]
            latents = effnet_latents(functional.interpolate(pixels, size, mode="nearest"), self.effnet)
            kept = draws.uniform("effnet_condition") >= self.recipe.effnet_dropout_rate
            return {"clip_text_pooled": pooled, "effnet": latents * kept.view(-1, 1, 1, 1)}
        image = torch.zeros(len(pixels), 1, 16)
        if self.vision is not None:
            shown = draws.uniform("image_condition") < self.recipe.clip_image_cond_rate
            image = self.embed(pixels)[:, None] * shown.view(-1, 1, 1)
        return {"clip_text_pooled": pooled, "clip_text": hidden, "clip_img": image}

    def embed(self, pixels: Tensor) -> Tensor:
        """CLIP's embedding of the middle square, 28 pixels to a side, of pictures of 128x96."""
        resized = functional.interpolate(pixels, (28, 37), mode="bicubic", antialias=True).clamp(0, 1)[..., 4:32]
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        return self.vision((resized - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)).image_embeds

    def latents(self, pixels: Tensor) -> Tensor:
        return (
            effnet_latents(pixels, self.effnet) if self.stage_a is None else self.stage_a.encode(pixels).latents / 0.43
        )

    @torch.no_grad()
    def measure(self, times: tuple[float, ...]) -> float:
        """The mean squared error for all photos, with noise and at times that are always the same."""
        pixels = torch.stack(list(self.pixels.values()))
        names = {path.name: path for path in self.photos.rglob("*.png")}
        hidden, pooled = self.encode_text(tuple(names[key].with_suffix(".caption").read_text() for key in self.pixels))
        given = {"clip_text": hidden, "clip_img": torch.zeros(len(pixels), 1, 16)}
        given = {"effnet": effnet_latents(pixels, self.effnet)} if self.stage_b else given
        if self.guide is not None:
            self.guide(pixels)
        clean, generator, losses = self.latents(pixels), torch.Generator().manual_seed(1), []
        for time in times:
            noise = torch.randn(clean.shape, generator=generator)
            level = log_snr(torch.full((len(pixels),), time))
            made = self.stage(noised(clean, noise, level), told_time(level), clip_text_pooled=pooled, **given).sample
            losses.append(float((made - noise).square().mean()))
        return sum(losses) / len(losses)

    def loss_of(self, batch: Batch) -> Tensor:
        """The loss of one micro-batch as it enters the backward pass, before it is divided for accumulation."""
        recipe = self.recipe
        draws = Draws(recipe.seed, batch.key.step_key, batch.size, CPU)
        pixels = torch.stack([self.pixels[Path(key).name] for key in batch.record_keys])
        with torch.no_grad():
            clean = self.latents(pixels)
            noise = draws.normal("noise", clean.shape[1:])
            if recipe.noise_offset:
                noise = noise + recipe.noise_offset * draws.normal("offset", (clean.shape[1], 1, 1))
            if self.stage_b:
                noise = pyramid(noise, draws)
            low, high = recipe.min_timestep / 1000, recipe.max_timestep / 1000
            t = (high - (high - low) * draws.uniform("timestep") + 0.001).clamp(max(low, 0.001), high)
            level = log_snr(t)
        conditions = self.conditions(batch, pixels, draws)
        if self.guide is not None:
            self.guide(pixels)
        prediction = self.stage(noised(clean, noise, level), told_time(level), **conditions).sample
        errors = (prediction - noise) ** 2
        if batch.mask is not None:
            errors = errors * functional.interpolate(batch.mask, size=errors.shape[-2:], mode="area")
        per_sample = errors.mean(dim=(1, 2, 3))
        weight = torch.tensor(
            [self.weight(float(row), float(loss)) for row, loss in zip(level, per_sample, strict=True)]
        )
        return (per_sample * batch.loss_weight * weight).mean()

    def weight(self, level: float, loss: float) -> float:
        """How much a loss counts at a log SNR."""
        recipe, snr = self.recipe, math.exp(level)
        if recipe.adaptive_loss_weight:
            bucket = sum(-10 + 20 * edge / 298 < level for edge in range(299))
            self.observed.setdefault(bucket, []).append(loss)
            return min(max(1 / self.bucket_losses[bucket], 1e-7), 1e7)
        if not (recipe.min_snr_gamma or recipe.debiased_estimation_loss):
            return 1 / (1 + snr)
        weight = min(snr, recipe.min_snr_gamma) / snr if recipe.min_snr_gamma else 1.0
        return weight / math.sqrt(min(snr, 1000)) if recipe.debiased_estimation_loss else weight

    def train(self, batches: list[Batch]) -> dict[str, Tensor]:
        """What trains after all micro-batches."""
        count = self.recipe.gradient_accumulation_steps
        for number in range(len(batches) // count):
            for batch in batches[number * count : (number + 1) * count]:
                (self.loss_of(batch) / count).backward()
            self.update(number + 1)
            for bucket, losses in self.observed.items():
                self.bucket_losses[bucket] = 0.99 * self.bucket_losses[bucket] + 0.01 * sum(losses) / len(losses)
            self.observed.clear()
        return {name: value.detach() for name, value in self.values.items()}

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Clip the gradients of all together, then AdamW."""
        recipe = self.recipe
        norm = math.sqrt(sum(float(value.grad.double().square().sum()) for value in self.values.values()))
        factor = min(1.0, recipe.max_grad_norm / (norm + 1e-6)) if recipe.max_grad_norm else 1.0
        for name, value in self.values.items():
            rate = next(rate for start, rate in recipe.rates.items() if name.startswith(start))
            rate *= min(number / recipe.lr_warmup_steps, 1)
            first, second = self.moments[name]
            slow, fast = recipe.betas
            first.mul_(slow).add_(value.grad * factor * (1 - slow))
            second.mul_(fast).add_((value.grad * factor) ** 2 * (1 - fast))
            mean, spread = first / (1 - slow**number), second / (1 - fast**number)
            value.mul_(1 - rate * recipe.weight_decay).sub_(rate * mean / (spread.sqrt() + recipe.eps))
            value.grad = None


def largest_error(before: Mapping[str, Tensor], expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """Largest difference of any value's way, as a share of the longest way."""
    moved = max(float((expected[name] - before[name]).abs().max()) for name in expected)
    assert moved > 0
    return max(float((expected[name] - found[name]).abs().max()) for name in expected) / moved
