"""Dataset configurations: precedence, kinds, and every mistake reported at once with its place and cure."""

import json

import pytest
from scan_helpers import config, load, write_image

from library.errors import UserError


@pytest.fixture
def images(tmp_path):
    for name in ("a", "b"):
        write_image(tmp_path / name / "1.png")
    (tmp_path / "masks").mkdir()
    (tmp_path / "meta.json").write_text('{"1": {"caption": "x"}}', encoding="utf-8")
    return tmp_path


def problems_of(**arguments):
    with pytest.raises(UserError) as caught:
        load(**arguments)
    return [str(problem) for problem in caught.value.problems]


def toml(folder, body):
    return config(folder, body.replace("DIR", str(folder)))


def subset_of(folder, body, **arguments):
    return load(dataset_config=toml(folder, body), **arguments)[0].subsets[0]


def test_first_value_that_is_present_wins(images):
    path = toml(
        images,
        """
        [general]
        flip_aug = true
        keep_tokens = 1
        batch_size = 2
        [[datasets]]
        keep_tokens = 2
        shuffle_caption = true
        resolution = [64, 128]
        [[datasets.subsets]]
        image_dir = 'DIR/a'
        keep_tokens = 3
        shuffle_caption = false
        caption_prefix = ""
        [[datasets.subsets]]
        image_dir = 'DIR/b'
        [[datasets]]
        [[datasets.subsets]]
        image_dir = 'DIR/a'
        num_repeats = 4
        """,
    )
    first, second = load(
        dataset_config=path,
        batch_size=8,
        resolution="256",
        subset={"keep_tokens": 9, "color_aug": True, "num_repeats": 7, "caption_prefix": "P"},
    )
    assert (first.resolution_wh, second.resolution_wh) == ((64, 128), (256, 256))
    assert (first.batch_size, second.batch_size) == (2, 2)
    a, b = first.subsets
    assert (a.keep_tokens, b.keep_tokens, second.subsets[0].keep_tokens) == (3, 2, 1)
    assert (a.shuffle_caption, b.shuffle_caption) == (False, True)
    assert (a.caption_prefix, b.caption_prefix) == ("", "P")
    assert a.flip_aug and a.color_aug and a.num_repeats == 7
    assert [s.index for spec in (first, second) for s in spec.subsets] == [0, 1, 2]
    assert second.subsets[0].dataset == 1


def test_explicit_false_beats_the_flag(images):
    subset = subset_of(
        images,
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\nflip_aug = false\n",
        subset={"flip_aug": True},
    )
    assert subset.flip_aug is False


def test_json_is_read_like_toml(images):
    body = {
        "datasets": [{"resolution": 64, "subsets": [{"image_dir": str(images / "a"), "caption_extension": "tags"}]}]
    }
    (spec,) = load(dataset_config=config(images, "\ufeff" + json.dumps(body), "data.JSON"))
    assert spec.subsets[0].caption_extension == ".tags"


@pytest.mark.parametrize("value", ["1024", '"1024,1024"', "[1024, 1024]", '"1024"'])
def test_spellings_of_resolution(images, value):
    path = toml(images, f"[[datasets]]\nresolution = {value}\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n")
    assert load(dataset_config=path)[0].resolution_wh == (1024, 1024)


def test_whole_numbers_where_fractions_are_expected(images):
    body = "[[datasets]]\nnetwork_multiplier = 2\nvalidation_split = 1\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n"
    (spec,) = load(dataset_config=toml(images, body + "face_crop_aug_range = [2, 4]\nvalidation_split = 0.5\n"))
    assert spec.network_multiplier == 2.0
    assert spec.validation_split == 1
    assert spec.subsets[0].validation_split == 0.5
    assert spec.subsets[0].face_crop_aug_range == (2, 4)


def test_all_problems_are_reported_at_once(images):
    path = toml(
        images,
        """
        stray = 1
        [general]
        alpha_mask = true
        enable_buckets = true
        [[datasets]]
        batch_size = true
        bucket_reso_steps = 0
        validation_split = 1.5
        cache_latents = true
        [[datasets.subsets]]
        image_dir = 'DIR/a'
        resolution = 512
        keep_tokens = "1"
        caption_dropout_rate = 2
        resize_interpolation = "lanzcos"
        face_crop_aug_range = [2.0]
        [[datasets.subsets]]
        num_repeats = 1.5
        """,
    )
    found = problems_of(dataset_config=path, enable_bucket=True, resolution="512")
    expected = {
        ": stray": "unknown table or key",
        "general.alpha_mask": "Move it to [[datasets.subsets]]",
        "general.enable_buckets": "Did you mean 'enable_bucket'",
        "datasets[0].batch_size": "must be a whole number, not True",
        "datasets[0].bucket_reso_steps": "must be at least 1",
        "datasets[0].validation_split": "must be at most 1",
        "datasets[0].cache_latents": "Give --cache_latents on the command line",
        "subsets[0].resolution": "Move it to [general] or [[datasets]]",
        "subsets[0].keep_tokens": "must be a whole number, not '1'",
        "subsets[0].caption_dropout_rate": "must be at most 1",
        "subsets[0].resize_interpolation": "did you mean 'lanczos'",
        "subsets[0].face_crop_aug_range": "two numbers",
        "subsets[1].num_repeats": "must be a whole number, not 1.5",
        "subsets[1].image_dir": "is required",
    }
    for place, words in expected.items():
        matching = [line for line in found if place in line]
        assert len(matching) == 1, (place, found)
        assert words in matching[0]
        assert path in matching[0]
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "names no data sets"),
        ("[[datasets]]\n", "has no subsets"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\nmetadata_file = 'DIR/meta.json'\n", "metadata"),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\nconditioning_data_dir = 'DIR/masks'\n",
            "--masked_loss",
        ),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR/maskz'\n", "Did you mean 'masks'"),
        ("[datasets]\nsubsets = 1\n", "must be a list of tables"),
        ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "D:\\new\\train"\n', "single quotes or forward slashes"),
        ("[[datasets]]\nresolution = 512.0\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n", "must be a size"),
        ("[[datasets]]\nresolution = [1, 2, 3]\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n", "must be a size"),
        ('[[datasets]]\nresolution = "abc"\n[[datasets.subsets]]\nimage_dir = "DIR/a"\n', "such as 512"),
        (
            "[general]\nenable_bucket = true\n[[datasets]]\nresolution = [1024, 1536]\n"
            "[[datasets.subsets]]\nimage_dir = 'DIR/a'\n",
            "1536",
        ),
        (
            "[[datasets]]\nenable_bucket = true\nmin_bucket_reso = 32\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n",
            "min_bucket_reso",
        ),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\nnum_repeats = 0\n", "no subset"),
    ],
)
def test_one_mistake(images, body, words):
    found = problems_of(dataset_config=toml(images, body), resolution="512")
    assert any(words in line for line in found), found


def test_null_is_a_wrong_type(images):
    body = {"datasets": [{"batch_size": None, "subsets": [{"image_dir": str(images / "a")}]}]}
    found = problems_of(dataset_config=config(images, json.dumps(body), "data.json"))
    assert len(found) == 1
    assert "must be a whole number" in found[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("resolution = \n", "line 1"),
        ('[[datasets]]\nimage_dir = "C:\\Users\\x"\n', "line 2"),
        ("[general]\nflip_aug = True\n", "small letters"),
        ("[general]\n[general]\n", "only once"),
        ("a" * 3 + " = " + "[" * 50_000, "data.toml"),
    ],
)
def test_syntax_errors_show_the_line(images, text, words):
    found = problems_of(dataset_config=config(images, text))
    assert len(found) == 1
    assert words in found[0]
    assert "\n" not in found[0]


@pytest.mark.parametrize("name", ["data.yaml", "missing.toml"])
def test_unusable_files(images, name):
    if name != "missing.toml":
        config(images, "", name)
    assert name in problems_of(dataset_config=str(images / name))[0]


def test_json_errors_show_the_place(images):
    for text, words in [
        ("{", "line 1"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ("[NaN]", "NaN"),
        ("[]", "not a table"),
    ]:
        assert words in problems_of(dataset_config=config(images, text, "data.json"))[0]


def test_utf16_is_refused_and_bom_is_not(images):
    path = images / "data.toml"
    body = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{images / 'a'}'\n"
    path.write_text(body, encoding="utf-16")
    assert "UTF-16" in problems_of(dataset_config=str(path))[0]
    path.write_text(body.replace("\n", "\r\n"), encoding="utf-8-sig")
    assert len(load(dataset_config=str(path))) == 1


def test_which_kinds_a_script_accepts(images):
    meta = toml(images, "[[datasets]]\n[[datasets.subsets]]\nmetadata_file = 'DIR/meta.json'\nimage_dir = 'DIR/a'\n")
    assert load(("dreambooth", "finetuning"), dataset_config=meta)[0].kind == "finetuning"
    assert load(("finetuning",), dataset_config=meta)[0].kind == "finetuning"
    folder = toml(images, "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n")
    assert "DreamBooth data set" in problems_of(kinds=("finetuning",), dataset_config=folder)[0]


def test_masked_loss_replaces_dreambooth(images):
    body = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n"
    masked = toml(images, body + "conditioning_data_dir = 'DIR/masks'\n")
    (spec,) = load(dataset_config=masked, masked_loss=True, subset={"alpha_mask": True})
    assert spec.kind == "controlnet"
    assert spec.subsets[0].conditioning_data_dir == str(images / "masks")
    assert spec.subsets[0].alpha_mask is False
    plain = toml(images, body)
    assert "--alpha_mask" in problems_of(dataset_config=plain, masked_loss=True)[0]
    assert load(("dreambooth", "finetuning"), dataset_config=plain, masked_loss=True)[0].kind == "dreambooth"
    for key in ("class_tokens = 'x'", "is_reg = true", "alpha_mask = true"):
        found = problems_of(
            dataset_config=toml(images, body + "conditioning_data_dir = 'DIR/masks'\n" + key), masked_loss=True
        )
        assert key.split()[0] in found[0]
    write_image(images / "tree" / "1_x" / "1.png")
    assert "--masked_loss" in problems_of(train_data_dir=str(images / "tree"), masked_loss=True)[0]


def test_keys_of_metadata_data_sets(images):
    body = "[[datasets]]\n{}\n[[datasets.subsets]]\nmetadata_file = 'DIR/meta.json'\n"
    for key in ("caption_extension = '.txt'", "cache_info = true", "class_tokens = 'x'"):
        found = problems_of(kinds=("dreambooth", "finetuning"), dataset_config=toml(images, body.format(key)))
        assert "is not allowed" in found[0]
        general = f"[general]\n{key}\n" + body.format("")
        assert load(("dreambooth", "finetuning"), dataset_config=toml(images, general))
        assert "is not allowed" in problems_of(kinds=("finetuning",), dataset_config=toml(images, general))[0]


def test_mixed_subsets_are_told_apart(images):
    path = toml(
        images,
        "[[datasets]]\n[[datasets.subsets]]\nmetadata_file = 'DIR/meta.json'\n"
        "[[datasets.subsets]]\nimage_dir = 'DIR/a'\n",
    )
    found = problems_of(kinds=("dreambooth", "finetuning"), dataset_config=path)
    assert any("cannot be mixed" in line for line in found)


def test_scripts_without_caption_dropout(images):
    path = toml(
        images, "[general]\ncaption_dropout_rate = 0.1\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n"
    )
    assert load(dataset_config=path)[0].subsets[0].caption_dropout_rate == 0.1
    assert "no caption dropout" in problems_of(dataset_config=path, caption_dropout=False)[0]


def test_repeated_subsets_are_used_once(images, caplog):
    path = toml(
        images,
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\nnum_repeats = 2\n"
        "[[datasets.subsets]]\nimage_dir = 'DIR/./a'\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n",
    )
    first, second = load(dataset_config=path)
    assert [s.num_repeats for s in first.subsets] == [2]
    assert len(second.subsets) == 1
    assert "already in this data set" in caplog.text


def test_folder_tree(tmp_path, caplog):
    for name in ("10_sks dog", "5_a_b c", "03_x", "3", "2_", "cat", "0_zero", "_x", "1.5_x", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "reg" / "1_dog").mkdir(parents=True)
    (spec,) = load(train_data_dir=str(tmp_path), reg_data_dir=str(tmp_path / "reg"))
    found = [(s.num_repeats, s.class_tokens, s.is_reg) for s in spec.subsets]
    assert found == [
        (3, "x", False),
        (10, "sks dog", False),
        (2, "", False),
        (3, "", False),
        (5, "a_b c", False),
        (1, "dog", True),
    ]
    assert "rename it to '10_cat'" in caplog.text
    assert "asks for 0 repeats" in caplog.text
    assert ".hidden" not in caplog.text


def test_folder_tree_without_a_usable_folder(tmp_path):
    (tmp_path / "cat").mkdir()
    assert "10_cat" in problems_of(train_data_dir=str(tmp_path))[0]
    write_image(tmp_path / "flat" / "1.png")
    assert "holds 1 images but no folder" in problems_of(train_data_dir=str(tmp_path / "flat"))[0]
    assert "No such file" in problems_of(train_data_dir=str(tmp_path / "gone"))[0]
    assert "no training data" in problems_of()[0]


def test_metadata_and_conditioning_from_the_command_line(images):
    (spec,) = load(("dreambooth", "finetuning"), in_json=str(images / "meta.json"), train_data_dir=str(images / "a"))
    assert (spec.kind, spec.subsets[0].image_dir) == ("finetuning", str(images / "a"))
    masks = str(images / "masks")
    (spec,) = load(
        ("controlnet",), train_data_dir=str(images / "a"), conditioning_data_dir=masks, subset={"num_repeats": 5}
    )
    assert (spec.kind, spec.subsets[0].num_repeats, spec.subsets[0].conditioning_data_dir) == ("controlnet", 1, masks)


def test_config_file_replaces_folders_with_a_warning(images, caplog):
    path = toml(images, "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n")
    load(dataset_config=path, train_data_dir="elsewhere", in_json="x.json")
    assert "--train_data_dir and --in_json ignored" in caplog.text


def test_resolution_is_required_and_steps_must_fit(images):
    path = toml(images, "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n")
    assert "resolution is required" in problems_of(dataset_config=path, resolution=None)[0]
    options = {"dataset_config": path, "resolution": "512", "bucket_reso_steps": 32}
    assert load(**options)
    assert "bucket_reso_steps = 64" in problems_of(**options, enable_bucket=True)[0]
    assert load(**options, enable_bucket=True, step=32)
