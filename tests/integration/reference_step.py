"""Training steps written a second time, plainly, from the published formulas: diffusers, transformers and torch alone.

Only the random numbers come from the toolkit (`library.draws`), since a step cannot be repeated without them. Fields of
`Recipe` are named like the options of train_db.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from library.contracts import Batch
from library.draws import Draws

CPU = torch.device("cpu")
START, END = 49406, 49407


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a step is to do."""

    v2: bool = False
    v_parameterization: bool = False
    zero_terminal_snr: bool = False
    clip_skip: int | None = None
    max_token_length: int = 75
    no_token_padding: bool = False
    weighted: tuple[tuple[str, float], ...] = ()
    noise_offset: float = 0.0
    noise_offset_random_strength: bool = False
    adaptive_noise_scale: float = 0.0
    multires_noise_iterations: int = 0
    multires_noise_discount: float = 0.3
    ip_noise_gamma: float = 0.0
    ip_noise_gamma_random_strength: bool = False
    min_timestep: int = 0
    max_timestep: int = 1000
    loss_type: str = "l2"
    huber_schedule: str = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0
    min_snr_gamma: float = 0.0
    scale_v_pred_loss_like_noise_pred: bool = False
    v_pred_like_loss: float = 0.0
    debiased_estimation_loss: bool = False
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 0.0
    learning_rate: float = 0.1
    learning_rate_te: float | None = None


class Models:
    """The parts of a Diffusers folder, trainable."""

    def __init__(self, folder: Path) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").train()
        self.text = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
        self.vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.norm = getattr(self.text, "text_model", self.text).final_layer_norm

    def parameters(self) -> dict[str, Tensor]:
        """Every trainable tensor, named as in the files of a Diffusers folder."""
        unet = {f"unet.{name}": value for name, value in self.unet.named_parameters()}
        text = {f"text.text_model.{bare(name)}": value for name, value in self.text.named_parameters()}
        return unet | text


def bare(name: str) -> str:
    return name.removeprefix("text_model.")


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Diffusers folder, named as by `Models.parameters`."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    found = {f"unet.{name}": value for name, value in unet.items()}
    return found | {f"text.{name}": value for name, value in text.items()}


def schedule(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(cumulative alphas as trained, signal-to-noise ratio of the original schedule), float64 [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    original = torch.cumprod(1 - betas, 0)
    snr = original / (1 - original)
    if not recipe.zero_terminal_snr:
        return original, snr
    root = original.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2, snr


def make_noise(recipe: Recipe, latents: Tensor, draws: Draws) -> Tensor:
    count, channels, height, width = latents.shape
    noise = draws.normal("noise", (channels, height, width))
    if recipe.noise_offset:
        strength: Any = recipe.noise_offset
        if recipe.noise_offset_random_strength:
            strength = strength * draws.scalar("offset_strength")
        if recipe.adaptive_noise_scale:
            means = latents.mean(dim=(2, 3), keepdim=True)
            strength = torch.clamp(strength + recipe.adaptive_noise_scale * means.abs(), min=0)
        noise = noise + strength * draws.normal("offset", (channels, 1, 1))
    for level in range(recipe.multires_noise_iterations):
        ratio = 2 + 2 * draws.scalar(f"multires_ratio_{level}")
        small = max(1, int(height / ratio**level)), max(1, int(width / ratio**level))
        coarse = draws.normal(f"multires_{level}", (channels, *small))
        up = functional.interpolate(coarse, size=(height, width), mode="bilinear")
        noise = noise + up * recipe.multires_noise_discount**level
        if 1 in small:
            break
    return noise / noise.std() if recipe.multires_noise_iterations else noise


def elementwise(recipe: Recipe, difference: Tensor, t: Tensor, alphas: Tensor) -> Tensor:
    if recipe.loss_type == "l2":
        return difference**2
    if recipe.loss_type == "l1":
        return difference.abs()
    if recipe.huber_schedule == "constant":
        c = torch.full(t.shape, recipe.huber_c * recipe.huber_scale, dtype=torch.float64)
    elif recipe.huber_schedule == "exponential":
        c = recipe.huber_c ** (t / 1000) * recipe.huber_scale
    else:
        sigma = ((1 - alphas[t]) / alphas[t]).sqrt()
        c = (1 - recipe.huber_c) / (1 + sigma) ** 2 + recipe.huber_c
    c = c.float().view(-1, 1, 1, 1)
    smooth = 2 * ((difference**2 + c**2).sqrt() - c)
    return smooth * c if recipe.loss_type == "huber" else smooth


def loss_factor(recipe: Recipe, snr: Tensor) -> Tensor:
    """Product of the weightings at the timesteps with these signal-to-noise ratios."""
    factor, capped, v = torch.ones_like(snr), snr.clamp(max=1000), recipe.v_parameterization
    if recipe.min_snr_gamma:
        factor = factor * torch.minimum(snr, torch.tensor(recipe.min_snr_gamma)) / (snr + 1 if v else snr)
    if recipe.scale_v_pred_loss_like_noise_pred:
        factor = factor * capped / (capped + 1)
    if recipe.v_pred_like_loss:
        factor = factor + factor / (capped / (capped + 1)) * recipe.v_pred_like_loss
    if recipe.debiased_estimation_loss:
        factor = factor / (capped + 1) if v else factor / capped.sqrt()
    return factor.float()


def token_rows(models: Models, recipe: Recipe, caption: str) -> tuple[Tensor, Tensor]:
    """(ids, weights) of a caption, each [n,77] (shorter without padding)."""
    pad = 0 if recipe.v2 else END
    pieces = recipe.weighted or ((caption, 1.0),)
    ids, weights = [], []
    for text, weight in pieces:
        found = models.tokenizer(text, add_special_tokens=False).input_ids
        ids += found
        weights += [weight] * len(found)
    ids, weights = ids[: recipe.max_token_length], weights[: recipe.max_token_length]
    length = len(ids) + 2 if recipe.no_token_padding else recipe.max_token_length + 2
    missing = length - len(ids) - 2
    row = torch.tensor([START, *ids, END, *[pad] * missing])
    factors = torch.tensor([1.0, *weights, 1.0, *[1.0] * missing])
    if recipe.max_token_length == 75:
        return row[None], factors[None]
    starts = range(1, recipe.max_token_length, 75)
    chunks = torch.stack([torch.cat([row[:1], row[i : i + 75], row[-1:]]) for i in starts])
    inner = torch.stack([torch.cat([torch.ones(1), factors[i : i + 75], torch.ones(1)]) for i in starts])
    if recipe.v2:
        for chunk in chunks:
            if chunk[-2] not in (END, pad):
                chunk[-1] = END
            if chunk[1] == pad:
                chunk[1] = END
    return chunks, inner


def text_condition(models: Models, recipe: Recipe, captions: tuple[str, ...]) -> Tensor:
    rows = [token_rows(models, recipe, caption) for caption in captions]
    if recipe.no_token_padding:  # up to the longest caption of the batch
        longest = max(ids.shape[1] for ids, _ in rows)
        rows = [
            (functional.pad(ids, (0, longest - ids.shape[1]), value=0 if recipe.v2 else END), torch.ones(1, longest))
            for ids, _ in rows
        ]
    ids, weights = (torch.stack(column) for column in zip(*rows, strict=True))
    count, chunks, length = ids.shape
    states = models.text(ids.reshape(-1, length), output_hidden_states=True).hidden_states
    hidden = models.norm(states[-(recipe.clip_skip or 1)])
    hidden = hidden.reshape(count, chunks, length, -1) * weights[..., None]
    if chunks == 1:
        return hidden[:, 0]
    inner = [hidden[:, i, 1:-1] for i in range(chunks)]
    return torch.cat([hidden[:, 0, :1], *inner, hidden[:, -1, -1:]], dim=1)


def loss_of(models: Models, recipe: Recipe, batch: Batch, seed: int) -> Tensor:
    """The loss of one micro-batch as it enters the backward pass, before it is divided for accumulation."""
    draws = Draws(seed, batch.key.step_key, batch.size, CPU)
    with torch.no_grad():
        latents = batch.latents
        if latents is None:
            posterior = models.vae.encode(batch.pixels).latent_dist
            latents = posterior.mean + posterior.std * draws.normal("posterior", posterior.mean.shape[1:])
        latents = latents * 0.18215
        noise = make_noise(recipe, latents, draws)
        t = draws.integers("timestep", recipe.min_timestep, recipe.max_timestep)
        alphas, snr = schedule(recipe)
        signal, sigma = (x.float().view(-1, 1, 1, 1) for x in (alphas[t].sqrt(), (1 - alphas[t]).sqrt()))
        shown = noise
        if recipe.ip_noise_gamma:
            gamma = recipe.ip_noise_gamma
            gamma *= draws.scalar("ip_noise_strength") if recipe.ip_noise_gamma_random_strength else 1
            shown = noise + gamma * draws.normal("ip_noise", noise.shape[1:])
        noisy = signal * latents + sigma * shown
        target = signal * noise - sigma * latents if recipe.v_parameterization else noise
    prediction = models.unet(noisy, t, text_condition(models, recipe, batch.captions)).sample
    values = elementwise(recipe, prediction - target, t, alphas)
    if batch.mask is not None:
        values = values * functional.interpolate(batch.mask, size=values.shape[-2:], mode="area")
    per_sample = values.mean(dim=(1, 2, 3)) * batch.loss_weight * loss_factor(recipe, snr[t])
    return per_sample.mean()


def one_update(models: Models, recipe: Recipe, batches: list[Batch], seed: int) -> dict[str, Tensor]:
    """The weights after one update of plain gradient descent over these micro-batches."""
    for batch in batches:
        (loss_of(models, recipe, batch, seed) / recipe.gradient_accumulation_steps).backward()
    parameters = models.parameters()
    gradients = {name: value.grad for name, value in parameters.items() if value.grad is not None}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    factor = min(1.0, recipe.max_grad_norm / float(norm)) if recipe.max_grad_norm else 1.0
    text_rate = recipe.learning_rate if recipe.learning_rate_te is None else recipe.learning_rate_te
    after = {name: value.detach().clone() for name, value in parameters.items()}
    for name, gradient in gradients.items():
        after[name] -= (text_rate if name.startswith("text.") else recipe.learning_rate) * factor * gradient
    return after


def largest_error(before: dict[str, Tensor], expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    """Largest difference of the steps of any part, as a share of the largest step in that part."""
    worst = 0.0
    for part in ("unet.", "text."):
        names = [name for name in expected if name.startswith(part)]
        steps = max(float((expected[name] - before[name]).abs().max()) for name in names)
        error = max(float((expected[name] - found[name]).abs().max()) for name in names)
        assert steps > 0, f"nothing moved in {part}"
        worst = max(worst, error / steps)
    return worst


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
