"""Tiny BLIP and GIT models of the true structure, with a vocabulary of their own, as folders and as checkpoints."""

from __future__ import annotations

import json
import random
from pathlib import Path

_TEXT = """
[PAD] [UNK] [CLS] [SEP] [MASK] a picture of the with word on it and dog cat duck bear robot car sitting standing red
green blue small large grass table man woman hat street snow ##s ##ing . , describe this in one sentence user assistant
"""
WORDS = tuple(_TEXT.split())
BLIP_SIZE, GIT_SIZE = 32, 32
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def write_vocabulary(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")


def _write_processor(folder: Path, kind: str, image_settings: dict) -> None:
    write_vocabulary(folder)
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    common = {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255, "resample": 3}
    common |= {"image_mean": MEAN, "image_std": STD, "processor_class": f"{kind}Processor"}
    (folder / "preprocessor_config.json").write_text(json.dumps({**common, **image_settings}))


def _shake(model, seed: int):
    """Give all weights sizes at which pictures and words matter, the same in every version of the libraries."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            scale = 0.6 if weight.dim() > 1 else 0.1
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            weight.copy_(centre + scale * torch.randn(weight.shape, generator=draw) / max(weight.shape[-1], 4) ** 0.25)
    return model.eval()


def make_blip(folder: Path, *, seed: int = 1) -> Path:
    """Write a tiny BLIP as transformers saves it."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = {"vocab_size": len(WORDS) + 2, "hidden_size": 64, "encoder_hidden_size": 128, "intermediate_size": 96}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 1, "max_position_embeddings": 64}
    text |= {"bos_token_id": len(WORDS), "sep_token_id": 3, "pad_token_id": 0, "eos_token_id": 2}
    vision = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": BLIP_SIZE, "patch_size": 16, "layer_norm_eps": 1e-6}
    model = _shake(BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)), seed)
    model.save_pretrained(folder)
    image = {"image_processor_type": "BlipImageProcessor", "size": {"height": BLIP_SIZE, "width": BLIP_SIZE}}
    _write_processor(folder, "Blip", image)
    return folder


def make_git(folder: Path, *, seed: int = 2) -> Path:
    """Write a tiny GIT as transformers saves it."""
    from transformers import GitConfig, GitForCausalLM

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": GIT_SIZE, "patch_size": 16}
    config = GitConfig(
        vision_config=vision,
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    _shake(GitForCausalLM(config), seed).save_pretrained(folder)
    square = {"height": GIT_SIZE, "width": GIT_SIZE}
    image = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": GIT_SIZE}}
    _write_processor(folder, "Git", {**image, "crop_size": square, "do_center_crop": True, "do_convert_rgb": True})
    return folder


def make_original_blip(folder: Path, source: Path) -> Path:
    """Write the weights of a folder of `make_blip` as its authors do, with what else their files hold."""
    import torch
    from transformers import BlipForConditionalGeneration

    from finetune.blip_weights import to_original

    model = BlipForConditionalGeneration.from_pretrained(source)
    tensors = {to_original(name): tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["text_decoder.bert.embeddings.position_ids"] = torch.arange(64)[None]
    write_vocabulary(folder)
    torch.save({"model": tensors, "epoch": 3}, folder / "model_tiny_caption.pth")
    return folder / "model_tiny_caption.pth"


def make_pictures(folder: Path, count: int = 5) -> Path:
    """Write small pictures that differ."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        draw = random.Random(index)
        pixels = bytes(draw.randrange(256) for _ in range(3 * 6 * 4))
        picture = Image.frombytes("RGB", (6, 4), pixels).resize((60 + 10 * index, 50), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index}.png")
    return folder


def _fast_tokenizer(**special):
    from tokenizers import BertWordPieceTokenizer
    from transformers import PreTrainedTokenizerFast

    pieces = BertWordPieceTokenizer(vocab={word: index for index, word in enumerate(WORDS)}, lowercase=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        **special,
    )


def make_blip2(folder: Path) -> Path:
    """Write a tiny BLIP-2 with OPT as transformers saves it: a model with a processor of its own, asked nothing."""
    from transformers import AutoImageProcessor, Blip2Config, Blip2ForConditionalGeneration, Blip2Processor

    _write_processor(
        folder, "Blip", {"image_processor_type": "BlipImageProcessor", "size": {"height": 32, "width": 32}}
    )
    images = AutoImageProcessor.from_pretrained(folder)
    words = _fast_tokenizer(additional_special_tokens=["<image>"])
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"model_type": "opt", "vocab_size": len(words), "ffn_dim": 64, "word_embed_proj_dim": 32}
    text |= {"max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = Blip2Config(
        vision_config={**common, "intermediate_size": 64, "image_size": 32, "patch_size": 16},
        qformer_config={**common, "intermediate_size": 64, "encoder_hidden_size": 32, "vocab_size": len(words)},
        text_config={**common, **text},
        num_query_tokens=4,
        image_token_index=len(WORDS),
    )
    _shake(Blip2ForConditionalGeneration(config), 3).save_pretrained(folder)
    Blip2Processor(image_processor=images, tokenizer=words, num_query_tokens=4).save_pretrained(folder)
    return folder


def make_llava(folder: Path) -> Path:
    """Write a tiny LLaVA as transformers saves it: a model that is talked to, through a template."""
    from transformers import AutoImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    square = {"height": 32, "width": 32}
    image = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": square}
    _write_processor(folder, "Llava", {**image, "do_center_crop": True})
    images = AutoImageProcessor.from_pretrained(folder)
    words = _fast_tokenizer(extra_special_tokens={"image_token": "<image>"})
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"model_type": "llama", "vocab_size": len(words), "num_key_value_heads": 2}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    vision = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 16, "projection_dim": 32}
    config = LlavaConfig(
        vision_config={**common, **vision}, text_config={**common, **text}, image_token_index=len(WORDS)
    )
    _shake(LlavaForConditionalGeneration(config), 4).save_pretrained(folder)
    LlavaProcessor(
        image_processor=images,
        tokenizer=words,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}user {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} assistant",
    ).save_pretrained(folder)
    return folder
