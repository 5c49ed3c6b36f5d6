"""Sizes given in those of the pictures that are to be drawn, where the encoder sees smaller ones."""

from dataclasses import replace
from fractions import Fraction

import pytest

from library.data.buckets import BucketChooser, resolution_list
from library.data.dataset_config import load_dataset_specs
from library.data.options import SubsetOptions
from library.data.spec_sizes import step_as_given
from library.errors import UserError
from library.models.cascade.specs import STAGE_B, STAGE_C
from library.option_parser import parse
from tests.unit.data.scan_helpers import config, write_image


@pytest.fixture
def folder(tmp_path):
    write_image(tmp_path / "photos" / "5_duck" / "a.png", (400, 300))
    return tmp_path / "photos"


def options(folder, *words):
    import stable_cascade_train_stage_c as script

    wanted = ("--stage_c_checkpoint_path=c", "--effnet_checkpoint_path=e", f"--train_data_dir={folder}")
    return parse(script.Options, [*wanted, "--enable_bucket", "--debug_dataset", *words]).data


def specs(data):
    multiple = STAGE_C.bucket_step_multiple
    return load_dataset_specs(data, SubsetOptions(), kinds=("dreambooth",), bucket_step_multiple=multiple)


def test_three_quarters_of_the_size_to_draw_at(folder):
    data = options(folder, "--resolution=1024", "--effnet_scale=0.75")
    assert data.bucket_reso_steps == 128
    (spec,) = specs(data)
    assert (spec.resolution_wh, spec.min_bucket_reso, spec.max_bucket_reso) == ((768, 768), 192, 768)
    found = BucketChooser(spec).resolutions
    given = resolution_list((1024, 1024), 256, 1024, 128)
    assert found == tuple((width * 3 // 4, height * 3 // 4) for width, height in given)
    assert all(side % 32 == 0 for size in found for side in size)


def test_limits_are_rounded_as_they_were_given(folder):
    words = ("--min_bucket_reso=300", "--max_bucket_reso=1500", "--bucket_reso_steps=256", "--effnet_scale=0.75")
    (spec,) = specs(options(folder, "--resolution=1024,768", *words))
    assert (spec.resolution_wh, spec.min_bucket_reso, spec.max_bucket_reso) == ((768, 576), 192, 1152)
    assert spec.bucket_reso_steps == 192


def test_without_a_scale_sizes_are_those_of_the_encoder(folder):
    data = options(folder, "--resolution=768")
    assert (data.bucket_reso_steps, data.encoded_share) == (64, 1)
    assert specs(data)[0].resolution_wh == (768, 768)


def test_steps_that_do_not_fit_are_told_in_the_sizes_of_the_user(folder, tmp_path):
    with pytest.raises(UserError, match="bucket_reso_steps is 96, but this model needs a multiple of 128"):
        specs(options(folder, "--resolution=1024", "--bucket_reso_steps=96", "--effnet_scale=0.75"))
    table = f"""
        [[datasets]]
        resolution = 512
        enable_bucket = true
        [[datasets.subsets]]
        image_dir = '{folder / "5_duck"}'
        class_tokens = 'duck'
    """
    path = config(tmp_path, table)
    (spec,) = specs(options(folder, f"--dataset_config={path}", "--effnet_scale=0.5"))
    assert (spec.resolution_wh, spec.bucket_reso_steps) == ((256, 256), 32)


def test_without_buckets_sides_must_fit_too(folder):
    def problem(resolution, scale=1.0, multiple=STAGE_C.side_multiple):
        data = replace(options(folder, f"--resolution={resolution}", f"--effnet_scale={scale}"), enable_bucket=False)
        with pytest.raises(UserError) as caught:
            load_dataset_specs(
                data, SubsetOptions(), kinds=("dreambooth",), bucket_step_multiple=32, side_multiple=multiple
            )
        return str(caught.value)

    assert "the sides of the resolution 700x512 must be multiples of 32. Use 704,512" in problem("700,512")
    assert "must be multiples of 128. Use 1024,1024, or enable_bucket" in problem("1000", 0.75)
    assert "must be multiples of 8. Use 8,1000" in problem("3,1000", multiple=STAGE_B.side_multiple)
    assert specs(replace(options(folder, "--resolution=700"), enable_bucket=False))


def test_lists_of_aspect_ratios_keep_the_steps_of_the_encoder(folder):
    ratios = ("--multi_aspect_ratio", "1/1", "3/4")
    (scaled,) = specs(options(folder, "--resolution=1024", "--effnet_scale=0.75", *ratios))
    (plain,) = specs(options(folder, "--resolution=768", *ratios))
    assert scaled.bucket_sizes == plain.bucket_sizes == ((640, 864), (768, 768), (864, 640))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--in_json=x.json", "--effnet_scale=0.75"), "needs --resolution, which it scales"),
        (("--resolution=512", "--dataset_class=a.B", "--effnet_scale=0.75"), "cannot be combined with --dataset_class"),
        (("--resolution=512", "--effnet_scale=0"), "effnet_scale"),
    ],
)
def test_what_cannot_be_scaled(folder, words, message):
    with pytest.raises(UserError, match=message):
        options(folder, *words)


@pytest.mark.parametrize(("share", "step"), [("1", 32), ("3/4", 128), ("1/2", 64), ("2/3", 48), ("7/10", 320)])
def test_steps_of_given_sides(share, step):
    share = Fraction(share)
    assert step_as_given(32, share) == step
    assert step * share % 32 == 0
    assert not any(smaller * share % 32 == 0 for smaller in range(1, step))


def test_the_size_to_draw_at_is_told(folder, caplog):
    from types import SimpleNamespace

    from library.training.cascade_training import tell_drawn_size

    caplog.set_level("INFO")
    tell_drawn_size(SimpleNamespace(specs=specs(options(folder, "--resolution=768"))))
    assert "training at 768x768 is for drawing at 1024x1024" in caplog.text
