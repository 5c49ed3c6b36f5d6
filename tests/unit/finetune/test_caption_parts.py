"""Parts of captioning: pictures as models want them, names of BLIP's weights, sampling, downloads."""

import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import downloads
from finetune.blip_weights import read_original, structure_of, to_original, to_transformers
from finetune.caption_inputs import ImageRecipe, recipe_of
from finetune.caption_sampling import NucleusRows
from library.errors import UserError
from tests.caption_models import make_blip, make_git, make_original_blip

PHOTOS = sorted((Path(__file__).parents[3] / "examples" / "photos" / "duck").glob("*.jpg"))


class TestRecipe:
    @pytest.mark.parametrize("make", [make_blip, make_git])
    def test_pixels_equal_those_of_transformers(self, make, tmp_path):
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(make(tmp_path)).image_processor
        recipe = recipe_of(processor)
        photos = [Image.open(path).convert("RGB") for path in PHOTOS]
        wanted = processor(images=photos, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(recipe.pixel_values([recipe(path) for path in PHOTOS]), wanted, rtol=0, atol=1e-5)

    def test_upright_pictures_are_cut_like_lying_ones(self, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (90, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "up.png")
        Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "down.png")
        recipe = ImageRecipe(shortest=20, crop_wh=(20, 16))
        turned = ImageRecipe(shortest=20, crop_wh=(16, 20))
        up, down = recipe(tmp_path / "up.png"), turned(tmp_path / "down.png")
        assert up.shape == (16, 20, 3)
        # Pillow rounds after each of its two passes, so the order of these shows in the last bit.
        np.testing.assert_allclose(up.astype(int), down.transpose(1, 0, 2), atol=2)

    def test_other_processors_are_left_to_transformers(self):
        class LlavaImageProcessor:
            do_resize = do_rescale = do_normalize = True

        assert recipe_of(LlavaImageProcessor()) is None


NAMES = {
    "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
    "visual_encoder.patch_embed.proj.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual_encoder.blocks.23.norm1.bias": "vision_model.encoder.layers.23.layer_norm1.bias",
    "visual_encoder.blocks.0.attn.qkv.weight": "vision_model.encoder.layers.0.self_attn.qkv.weight",
    "visual_encoder.blocks.0.attn.proj.bias": "vision_model.encoder.layers.0.self_attn.projection.bias",
    "visual_encoder.blocks.11.norm2.weight": "vision_model.encoder.layers.11.layer_norm2.weight",
    "visual_encoder.blocks.11.mlp.fc2.weight": "vision_model.encoder.layers.11.mlp.fc2.weight",
    "visual_encoder.norm.weight": "vision_model.post_layernorm.weight",
    "text_decoder.bert.encoder.layer.3.crossattention.self.key.weight": None,
    "text_decoder.cls.predictions.bias": None,
}


class TestOriginalLayout:
    @pytest.mark.parametrize("original", NAMES)
    def test_names(self, original):
        new = NAMES[original] or original
        assert to_transformers(original) == new
        assert to_original(new) == original

    @pytest.mark.parametrize("name", ["visual_encoder.head.weight", "visual_encoder.norms.weight", "unet.x"])
    def test_other_names_are_not_ours(self, name):
        assert to_transformers(name) is None

    def test_every_weight_goes_there_and_back(self, tmp_path):
        from transformers import BlipForConditionalGeneration

        folder = make_blip(tmp_path / "blip")
        wanted = BlipForConditionalGeneration.from_pretrained(folder).state_dict()
        found = read_original(make_original_blip(tmp_path / "original", folder))
        assert set(found) == set(wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        structure = structure_of(found, tmp_path)
        vision, text = structure["vision_config"], structure["text_config"]
        assert (vision["hidden_size"], vision["num_attention_heads"], vision["num_hidden_layers"]) == (128, 2, 2)
        assert (vision["image_size"], vision["patch_size"], vision["intermediate_size"]) == (32, 16, 96)
        assert (text["hidden_size"], text["num_attention_heads"], text["num_hidden_layers"]) == (64, 1, 2)
        assert (text["encoder_hidden_size"], text["max_position_embeddings"]) == (128, 64)

    def test_what_is_no_blip(self, tmp_path):
        path = tmp_path / "x.pth"
        torch.save({"model": {"weight": torch.zeros(2)}}, path)
        with pytest.raises(UserError, match="is no captioning model of BLIP"):
            read_original(path)

    def test_a_blip_with_more_in_it_or_less(self, tmp_path):
        path = make_original_blip(tmp_path, make_blip(tmp_path / "blip"))
        whole = torch.load(path)["model"]
        torch.save({"model": {**whole, "visual_encoder.blocks.0.adapter": torch.zeros(2)}}, path)
        with pytest.raises(UserError, match="tensors that BLIP does not have .visual_encoder.blocks.0.adapter"):
            read_original(path)
        torch.save({"model": {name: value for name, value in whole.items() if "patch_embed" not in name}}, path)
        with pytest.raises(UserError, match="lacks the tensor"):
            structure_of(read_original(path), path)


class TestSampling:
    LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5]).log_softmax(-1)

    def draws(self, count: int, **settings) -> torch.Tensor:
        rows = NucleusRows([f"{index}.png" for index in range(count)], **settings)
        scores = rows(torch.zeros(count, 1), self.LOGITS.expand(count, -1))
        assert ((scores == 0).sum(-1) == 1).all()
        return scores.argmax(-1)

    def test_tokens_come_as_often_as_their_probabilities_say(self):
        found = torch.bincount(self.draws(6000, seed=1, top_p=1.0), minlength=5) / 6000
        torch.testing.assert_close(found, self.LOGITS.exp(), atol=0.02, rtol=0)

    def test_the_nucleus_is_the_smallest_set_with_the_share(self):
        # 0.46, 0.28, 0.17, 0.06, 0.02: three tokens are needed for 0.8.
        found = torch.bincount(self.draws(6000, seed=1, top_p=0.8), minlength=5) / 6000
        kept = torch.tensor([1.0, 1, 0, 0, 1]) * self.LOGITS.exp()
        torch.testing.assert_close(found, kept / kept.sum(), atol=0.02, rtol=0)
        assert (self.draws(50, seed=1, top_p=0.0001) == 0).all()
        assert set(self.draws(200, seed=1, top_p=1.0, top_k=2).tolist()) == {0, 4}

    def test_a_picture_has_its_own_numbers(self):
        together = self.draws(20, seed=3, top_p=1.0)
        assert torch.equal(together[:7], self.draws(7, seed=3, top_p=1.0))
        assert not torch.equal(together, self.draws(20, seed=4, top_p=1.0))


class TestDownloads:
    @pytest.fixture
    def server(self, tmp_path):
        served = tmp_path / "served"
        served.mkdir()
        (served / "model.pth").write_bytes(b"x" * 3_000_000)
        asked = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *arguments):
                super().__init__(*arguments, directory=str(served))

            def do_GET(self):
                asked.append(self.path)
                if self.path == "/cut.pth":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b"too short")
                else:
                    super().do_GET()

            def log_message(self, *_):
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
            threading.Thread(target=running.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{running.server_port}", asked
            running.shutdown()

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
        return tmp_path / "cache" / "checkpoints"

    def test_a_file_is_fetched_once(self, server, cache):
        url, asked = server
        path = downloads.fetch(f"{url}/model.pth?download=1", "--caption_weights")
        assert path == cache / "model.pth"
        assert path.stat().st_size == 3_000_000
        assert downloads.fetch(f"{url}/model.pth", "--caption_weights") == path
        assert len(asked) == 1

    @pytest.mark.parametrize(
        ("name", "message"),
        [("gone.pth", "the server says 404"), ("cut.pth", "the connection (ended|broke off)"), ("", "names no file")],
    )
    def test_what_fails_leaves_nothing(self, server, cache, name, message):
        with pytest.raises(UserError, match=message):
            downloads.fetch(f"{server[0]}/{name}", "--caption_weights")
        assert not cache.exists() or not list(cache.iterdir())
