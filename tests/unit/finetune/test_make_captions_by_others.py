"""make_captions.py with models whose own processors make the inputs: BLIP-2, and LLaVA, which is talked to."""

from pathlib import Path

import pytest
import torch

from finetune import make_captions
from tests.caption_models import make_blip2, make_llava, make_pictures


def caption(folder: Path, model: Path, *options: str) -> dict[str, str]:
    with pytest.raises(SystemExit) as ended:
        make_captions.main(["--model_id", str(model), "--max_length=10", *options, str(folder)])
    assert ended.value.code == 0
    return {path.name: path.read_text(encoding="utf-8").strip() for path in folder.glob("*.caption")}


@pytest.fixture(scope="module", params=[make_blip2, make_llava])
def model(request, tmp_path_factory, one_torch_thread) -> Path:
    return request.param(tmp_path_factory.mktemp("model"))


def test_captions_do_not_depend_on_batches(model, tmp_path):
    one = caption(make_pictures(tmp_path / "one"), model)
    three = caption(make_pictures(tmp_path / "three"), model, "--batch_size=3", "--max_data_loader_n_workers=1")
    assert one == three
    assert len(set(one.values())) == 5
    assert one != caption(make_pictures(tmp_path / "seed"), model, "--seed=1")


def test_question_and_template_are_no_part_of_the_caption(model, tmp_path):
    found = caption(make_pictures(tmp_path / "a"), model, "--beam_search", "--prompt=describe the dog in this picture")
    assert len(found) == 5
    assert not any("describe the dog in this picture" in text or text.startswith("user") for text in found.values())


def test_llava_gets_what_its_processor_makes(tmp_path, one_torch_thread):
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = make_llava(tmp_path / "llava")
    found = caption(make_pictures(tmp_path / "pictures", 2), folder, "--beam_search", "--prompt=describe the dog")
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    for name, text in found.items():
        picture = Image.open((tmp_path / "pictures" / name).with_suffix(".png"))
        inputs = processor(images=picture, text="user <image> describe the dog assistant", return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=10, min_new_tokens=5, do_sample=False)
        made = made[0, inputs["input_ids"].shape[1] :]
        assert text == " ".join(processor.tokenizer.decode(made, skip_special_tokens=True).split())
