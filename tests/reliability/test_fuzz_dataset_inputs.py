"""Whatever bytes a data set holds: a value, or a message for the user; never another exception, never endless work."""

import json
import os

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from library.data.caption_files import BadCaption, caption_of, decode_caption
from library.data.dataset_config import load_dataset_specs
from library.data.dataset_file import read_table
from library.data.dataset_spec import SubsetSpec
from library.data.folder_scan import FolderSettings
from library.data.image_headers import HEAD_BYTES, parse_header
from library.data.metadata_files import read_metadata
from library.data.metadata_scan import scan_metadata
from library.data.options import DatasetOptions, SubsetOptions
from library.errors import UserError

QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 2000),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.just("."),
)
NAMES = st.sampled_from(
    ["image_dir", "metadata_file", "conditioning_data_dir", "resolution", "batch_size", "num_repeats", "enable_bucket"]
    + ["min_bucket_reso", "bucket_reso_steps", "face_crop_aug_range", "custom_attributes", "caption_extension"]
    + ["validation_split", "subsets", "datasets", "general", "resize_interpolation", "is_reg", "alpha_mask", "nonsense"]
)
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4))
TABLE = st.dictionaries(NAMES, VALUE, max_size=5)
CONFIG = st.fixed_dictionaries(
    {},
    optional={
        "general": TABLE | VALUE,
        "datasets": st.lists(
            st.fixed_dictionaries({}, optional={"subsets": st.lists(TABLE, max_size=2) | VALUE, "resolution": VALUE}),
            max_size=2,
        )
        | VALUE,
        "more": VALUE,
    },
)


@QUICK
@given(CONFIG)
def test_any_table_gives_specs_or_problems(tmp_path, table):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(table))
    for kinds in (("dreambooth",), ("dreambooth", "finetuning"), ("controlnet",)):
        try:
            specs = load_dataset_specs(
                DatasetOptions(dataset_config=str(path), resolution="512"),
                SubsetOptions(),
                kinds=kinds,
                bucket_step_multiple=64,
            )
        except UserError as error:
            assert all(str(path) in problem.where for problem in error.problems)
        else:
            assert all(spec.subsets for spec in specs)


@QUICK
@given(st.binary(max_size=200))
@example(b"\xff\xfea\0")
@example(b"a=1\na=2")
@example(b'x = "\\uD800"')
def test_any_bytes_as_configuration(tmp_path, data):
    for name in ("c.toml", "c.json"):
        (tmp_path / name).write_bytes(data)
        try:
            assert isinstance(read_table(str(tmp_path / name)), dict)
        except UserError as error:
            assert name in str(error)


METADATA = st.dictionaries(
    st.text(alphabet=st.characters(codec=None), max_size=6) | st.sampled_from(["a", "a.png", "../x", "/etc", "."]),
    VALUE | st.fixed_dictionaries({}, optional={"caption": VALUE, "tags": VALUE, "image_size": VALUE}),
    max_size=4,
)


@QUICK
@given(METADATA)
def test_any_metadata_is_resolved_or_reported(tmp_path, table):
    folder = tmp_path / "images"
    folder.mkdir(exist_ok=True)
    path = tmp_path / "m.json"
    path.write_text(json.dumps(table))
    try:
        scan = scan_metadata(SubsetSpec(metadata_file=str(path), image_dir=str(folder)), FolderSettings())
    except UserError as error:
        assert "m.json" in str(error)
    else:
        assert len(scan.bad) == len(table)


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_as_metadata(tmp_path, data):
    for name in ("m.json", "m.jsonl"):
        (tmp_path / name).write_bytes(data)
        try:
            read_metadata(str(tmp_path / name))
        except UserError as error:
            assert name in str(error)


@given(st.binary(max_size=300), st.sampled_from(["utf-8", "cp932", "utf-16", "latin-1"]), st.booleans())
def test_any_bytes_as_caption(data, encoding, multiline):
    try:
        text = decode_caption(data, encoding)
    except BadCaption as error:
        assert "looks like" in error.reason
        return
    caption, _ = caption_of(text, multiline)
    assert "\0" not in caption
    assert caption == caption.strip()
    assert multiline or "\n" not in caption


@given(
    st.binary(max_size=400),
    st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"RIFF\0\0\0\0WEBPVP8X"]),
)
def test_any_bytes_as_image_header(data, start):
    data = start + data
    found = parse_header(data[:HEAD_BYTES], lambda offset, length: data[offset : offset + length])
    assert found is None or (min(found) > 0 and found[2] <= 8)


def test_undecodable_names_are_shown_escaped(tmp_path):
    from library.data.bad_files import BadFile

    assert str(BadFile(os.fsdecode(b"a\xff\nb.png"), "empty file")) == "a\\xff\\nb.png: empty file"
