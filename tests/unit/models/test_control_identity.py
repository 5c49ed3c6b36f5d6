"""Faces in a map, through detectors and recognisers of the right form that always see the same faces."""

import random

import numpy as np
import pytest

from library.errors import UserError
from library.models.cascade.control_choice import make_filter
from library.models.cascade.control_identity import _POINTS, _onto_face

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

STRIDES = (8, 16, 32)


def constants(path, size, outputs):
    """Write a model that looks at [1,3,size,size] and answers `outputs`, whatever it sees."""
    from onnx import TensorProto, helper, numpy_helper

    sees = helper.make_tensor_value_info("picture", TensorProto.FLOAT, [1, 3, size, size])
    nodes, answers = [], []
    for number, values in enumerate(outputs):
        value = numpy_helper.from_array(np.asarray(values, np.float32), f"value{number}")
        nodes.append(helper.make_node("Constant", [], [f"out{number}"], value=value))
        answers.append(helper.make_tensor_value_info(f"out{number}", TensorProto.FLOAT, list(np.shape(values))))
    graph = helper.make_graph(nodes, "constants", [sees], answers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def detector(path, faces):
    """Faces are (left, top, right, bottom, score) in the 640 pixels of the detector; found at stride 32."""
    outputs = [np.zeros(((640 // s) ** 2 * 2, width)) for width in (1, 4, 10) for s in STRIDES]
    for left, top, right, bottom, score in faces:
        x, y = (left + right) / 2, (top + bottom) / 2
        column, row = int(x // 32), int(y // 32)
        place = (row * 20 + column) * 2
        centre = np.array([column * 32, row * 32])
        outputs[2][place] = score
        outputs[5][place] = np.array([centre[0] - left, centre[1] - top, right - centre[0], bottom - centre[1]]) / 32
        points = (_POINTS / 112 * [right - left, bottom - top] + [left, top] - centre) / 32
        outputs[8][place] = points.reshape(-1)
    return constants(path, 640, outputs)


@pytest.fixture
def recognizer(tmp_path):
    return constants(tmp_path / "w600k_r50.onnx", 112, [np.arange(1, 513)[None]])


VECTOR = np.arange(1, 513) / np.linalg.norm(np.arange(1, 513))
PICTURE = np.full((320, 640, 3), 90, np.uint8)


def identity(tmp_path, recognizer, faces, *params):
    path = detector(tmp_path / f"det{len(faces)}.onnx", faces)
    return make_filter("IdentityFilter", (f"detector_path={path}", f"recognizer_path={recognizer}", *params))


def test_a_face_is_painted_where_it_is(tmp_path, recognizer):
    maker = identity(tmp_path, recognizer, [(64, 96, 160, 192, 0.9)], "p_drop=0", "p_full=0")
    (face,) = maker.faces(PICTURE)
    assert np.allclose(face.box, (64, 96, 160, 192), atol=1e-3)
    made = maker.prepare(PICTURE, random.Random(0))
    assert made.shape == (512, 10, 20)
    assert np.allclose(made[:, 3:6, 2:5], VECTOR[:, None, None], atol=1e-6)
    assert np.count_nonzero(made.any(0)) == 9


def test_small_pictures_are_looked_at_in_large(tmp_path, recognizer):
    maker = identity(tmp_path, recognizer, [(64, 96, 160, 192, 0.9)], "p_drop=0", "p_full=0")
    (face,) = maker.faces(PICTURE[::2, ::2].copy())
    assert np.allclose(face.box, (32, 48, 80, 96), atol=1e-3)


def test_chance_drops_faces_and_fills_the_map(tmp_path, recognizer):
    faces = [(64, 96, 160, 192, 0.9)]
    full = identity(tmp_path, recognizer, faces, "p_drop=0", "p_full=1").prepare(PICTURE, random.Random(0))
    assert np.allclose(full, VECTOR[:, None, None], atol=1e-6)
    dropped = identity(tmp_path, recognizer, faces, "p_drop=1", "p_full=1").prepare(PICTURE, random.Random(0))
    assert not dropped.any()
    maker = identity(tmp_path, recognizer, faces, "p_drop=0.5")
    kept = [bool(maker.prepare(PICTURE, random.Random(seed)).any()) for seed in range(20)]
    assert kept == [bool(maker.prepare(PICTURE, random.Random(seed)).any()) for seed in range(20)]
    assert 4 <= sum(kept) <= 16


def test_kept_faces_are_painted_as_new_ones(tmp_path, recognizer):
    faces = [(64, 96, 160, 192, 0.9), (448, 64, 512, 128, 0.7)]
    maker = identity(tmp_path, recognizer, faces, "p_drop=0.3")
    found = maker.find(PICTURE)
    assert maker.accepts(found, (320, 640)) and len(found["boxes"]) == 2
    for seed in range(5):
        made = maker.paint(found, (320, 640), random.Random(seed))
        assert np.array_equal(made, maker.prepare(PICTURE, random.Random(seed)))
    nobody = {"boxes": found["boxes"][:0], "vectors": found["vectors"][:0]}
    assert maker.accepts(nobody, (320, 640)) and not maker.paint(nobody, (320, 640), random.Random(0)).any()
    for wrong in (
        {},
        {**found, "boxes": found["boxes"][:1]},
        {**found, "vectors": found["vectors"][:, :9]},
        {**found, "boxes": found["boxes"] * np.float32(np.nan)},
        {**found, "boxes": found["boxes"].astype(np.float64)},
    ):
        assert not maker.accepts(wrong, (320, 640))
    assert identity(tmp_path, recognizer, faces[:1]).kept != maker.kept


def test_unsure_and_double_finds_do_not_count(tmp_path, recognizer):
    faces = [(64, 96, 160, 192, 0.9), (128, 96, 224, 192, 0.8), (300, 96, 364, 160, 0.3), (448, 64, 512, 128, 0.7)]
    maker = identity(tmp_path, recognizer, faces, "p_drop=0")
    assert len(maker.faces(PICTURE)) == 3
    overlapping = [(64, 96, 160, 192, 0.9), (80, 112, 176, 208, 0.8)]
    assert len(identity(tmp_path, recognizer, overlapping).faces(PICTURE)) == 1
    largest = identity(tmp_path, recognizer, faces, "p_drop=0", "p_full=0", "max_faces=1")
    assert np.count_nonzero(largest.prepare(PICTURE, random.Random(0)).any(0)) == 9


def test_faces_are_turned_upright():
    angle = 0.6
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    seen = (_POINTS @ turn.T * 2.5 + [31, 7]).astype(np.float32)
    matrix = _onto_face(seen)
    assert np.allclose(seen @ matrix[:, :2].T + matrix[:, 2], _POINTS, atol=1e-3)


def test_other_files_are_refused(tmp_path, recognizer):
    other = constants(tmp_path / "other.onnx", 640, [np.zeros((1, 4))])
    text = tmp_path / "text.onnx"
    text.write_text("no model", encoding="utf-8")
    for path, what in ((other, "finds no faces"), (text, "is no ONNX file"), (recognizer, "another kind of model")):
        maker = make_filter("identity", (f"detector_path={path}", f"recognizer_path={recognizer}"))
        with pytest.raises(UserError, match=what):
            maker.prepare(PICTURE, random.Random(0))
    small = constants(tmp_path / "small.onnx", 112, [np.zeros((1, 128))])
    with pytest.raises(UserError, match="tells no faces apart"):
        identity(tmp_path, small, [(64, 96, 160, 192, 0.9)], "p_drop=0").prepare(PICTURE, random.Random(0))
