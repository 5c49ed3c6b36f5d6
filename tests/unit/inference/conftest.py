import pytest
import torch
from torch import nn

from library.contracts import Condition, FamilySpec, TokenizerSpec
from library.models.tokenizer import ClipTokenizer

SPEC = FamilySpec(name="toy", prediction_type="epsilon", tokenizers=(TokenizerSpec("clip_l", 49407),))


class ToyDenoiser(nn.Module):
    """Mixes channels and neighbours, and lets text and time shift the result, so that everything matters."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 3, padding=1)
        self.text = nn.Linear(8, 4)

    def forward(self, noisy, t, hidden):
        shift = torch.sin(self.text(hidden.mean(dim=1))) + torch.sin(t.float() / 100)[:, None]
        return noisy * 0.7 + 0.3 * torch.tanh(self.mix(noisy) + shift[:, :, None, None])


class ToyFamily:
    """What the renderer needs of a family, in a few hundred weights; `seen` holds what the denoiser was given."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.spec = SPEC
        self.tokenizers = (ClipTokenizer(SPEC.tokenizers[0]),)
        self.denoiser = ToyDenoiser().eval()
        self.text_encoder = nn.Embedding(49408, 8).eval()
        for part in (self.denoiser, self.text_encoder):
            for parameter in part.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
        self.seen = []
        self.released = 0

    @property
    def text_encoders(self):
        return (self.text_encoder,)

    def encode_text(self, token_ids, weights=None):
        assert weights is None
        ids = token_ids[0]
        return Condition(hidden=torch.cumsum(self.text_encoder(ids), dim=2).flatten(1, 2))

    def encode_latents(self, pixels, noise):
        small = nn.functional.avg_pool2d(pixels, 8)
        return torch.cat([small, small.mean(1, keepdim=True)], 1) + 0.1 * noise

    def scale_latents(self, latents):
        return latents * 0.9

    def denoise(self, noisy, t, condition, control=None):
        self.seen.append((noisy, t, condition))
        return self.denoiser(noisy, t, condition.hidden)

    def decode(self, latents):
        return torch.tanh(latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))

    def release_vae(self):
        self.released += 1


@pytest.fixture
def family():
    return ToyFamily()
