"""Whose face is where: a filter that paints vectors of identity into a map, from local ONNX files.

The files are a detector of the SCRFD family (arXiv:2105.04714) such as `det_10g.onnx`, and a recogniser of the ArcFace
family (arXiv:1801.07698) such as `w600k_r50.onnx`. Neither comes with this toolkit, and their weights have licences of
their own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from library.checkpoints.hashes import file_sha256
from library.errors import UserError
from library.models.cascade.control_filters import Array, Picture, PlainFilter
from library.models.cascade.onnx_file import onnx_problem, run_onnx

_DOWNSCALE = 32
_VECTOR = 512
_SIDE, _FACE_SIDE = 640, 112
_STRIDES = (8, 16, 32)
_ANCHORS = 2
_SURE, _OVERLAP = 0.5, 0.4
_POINTS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)
"""Where eyes, nose and corners of the mouth lie in the faces that recognisers of this family were trained on."""


@dataclass(frozen=True, slots=True)
class Face:
    """A face: left, top, right, bottom in pixels, and its unit vector of identity [512]."""

    box: tuple[float, float, float, float]
    vector: NDArray[np.float32]

    @property
    def area(self) -> float:
        """Pixels that it covers."""
        return max(self.box[2] - self.box[0], 0) * max(self.box[3] - self.box[1], 0)


@dataclass(frozen=True, kw_only=True)
class IdentityFilter(PlainFilter):
    """Vectors of identity where the faces are, [512,H/32,W/32]; zeros elsewhere.

    Attributes:
        max_faces: the largest faces that count.
        p_drop: probability that a face is left out.
        p_full: probability that a single face fills the whole map.
        detector_path: ONNX file that finds faces.
        recognizer_path: ONNX file that tells them apart.
    """

    max_faces: int = 4
    p_drop: float = 0.05
    p_full: float = 0.3
    detector_path: str | None = None
    recognizer_path: str | None = None
    num_channels = _VECTOR

    def problem(self) -> str:
        """Return what is wrong with the parameters, or nothing."""
        for name, path in (("detector_path", self.detector_path), ("recognizer_path", self.recognizer_path)):
            wrong = "is required: a local ONNX file (det_10g.onnx and w600k_r50.onnx, for example)"
            if path is not None:
                wrong = onnx_problem(path)
            if wrong:
                return f"{name}: {wrong}"
        for name in ("p_drop", "p_full"):
            if not 0 <= getattr(self, name) <= 1:
                return f"{name}: must be between 0 and 1"
        return "" if self.max_faces >= 1 else "max_faces: must be at least 1"

    @property
    def kept(self) -> str:
        """Names what decides which faces are found: the two files."""
        return f"faces {file_sha256(self.detector_path or '')} {file_sha256(self.recognizer_path or '')}"

    def prepare(self, picture: Picture, rng: random.Random, mask: NDArray[np.bool_] | None = None) -> Array:
        """Find the faces and paint their vectors."""
        return self.paint(self.find(picture), (picture.shape[0], picture.shape[1]), rng)

    def find(self, picture: Picture) -> dict[str, NDArray[Any]]:
        """Return the boxes [n,4] and vectors [n,512] of all faces."""
        faces = self.faces(picture)
        boxes, vectors = [face.box for face in faces], [face.vector for face in faces]
        return {
            "boxes": np.array(boxes, np.float32).reshape(-1, 4),
            "vectors": np.array(vectors, np.float32).reshape(-1, _VECTOR),
        }

    def accepts(self, found: Mapping[str, NDArray[Any]], size_hw: tuple[int, int]) -> bool:
        """Whether `find` could have found this."""
        boxes, vectors = found.get("boxes"), found.get("vectors")
        if boxes is None or vectors is None or boxes.shape != (len(vectors), 4):
            return False
        fitting = vectors.shape == (len(boxes), _VECTOR) and boxes.dtype == vectors.dtype == np.float32
        return fitting and bool(np.isfinite(boxes).all() and np.isfinite(vectors).all())

    def paint(self, found: Mapping[str, NDArray[Any]], size_hw: tuple[int, int], rng: random.Random) -> Array:
        """Return a map with the vectors of the largest faces."""
        fills = rng.random() < self.p_full
        known = [
            Face(tuple(box), vector) for box, vector in zip(found["boxes"].tolist(), found["vectors"], strict=True)
        ]
        faces = sorted(known, key=lambda face: -face.area)[: self.max_faces]
        rows, columns = (max(side // _DOWNSCALE, 1) for side in size_hw)
        painted = np.zeros((_VECTOR, rows, columns), np.float32)
        kept = [face for face in faces if rng.random() >= self.p_drop]
        # Small ones last, so that a face in front of a larger one is seen.
        for face in kept:
            left, top, right, bottom = (round(side / _DOWNSCALE) for side in face.box)
            left, top = min(max(left, 0), columns - 1), min(max(top, 0), rows - 1)
            painted[:, top : max(bottom, top + 1), left : max(right, left + 1)] = face.vector[:, None, None]
        if len(faces) == 1 and kept and fills:
            painted[:] = faces[0].vector[:, None, None]
        return painted

    def faces(self, picture: Picture) -> list[Face]:
        """Return the faces in a picture [H,W,3].

        Raises:
            UserError: a file holds another kind of model.
        """
        boxes, points = _detect(str(self.detector_path), picture)
        return [
            Face(tuple(box), _vector(str(self.recognizer_path), picture, found))
            for box, found in zip(boxes.tolist(), points, strict=True)
        ]


def _detect(path: str, picture: Picture) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return boxes [n,4] and five points of each face [n,5,2], in pixels of the picture."""
    import cv2

    height, width = picture.shape[:2]
    scale = _SIDE / max(height, width)
    small: Any = cv2.resize(picture, (max(1, round(width * scale)), max(1, round(height * scale))))
    padded = np.zeros((_SIDE, _SIDE, 3), np.uint8)
    padded[: small.shape[0], : small.shape[1]] = small
    outputs = run_onnx(path, _blob(padded, 128.0))
    if len(outputs) != 3 * len(_STRIDES):
        raise UserError(f"finds no faces with five points: it has {len(outputs)} outputs, not 9", where=path)
    scores, boxes, points = [], [], []
    for level, stride in enumerate(_STRIDES):
        score, box, point = (np.asarray(outputs[level + kind * len(_STRIDES)]) for kind in range(3))
        side = _SIDE // stride
        if score.size != side * side * _ANCHORS or box.size != score.size * 4 or point.size != score.size * 10:
            raise UserError("finds no faces with five points: its outputs have other sizes", where=path)
        row, column = np.divmod(np.repeat(np.arange(side * side), _ANCHORS), side)
        centre = np.stack([column, row], 1).astype(np.float32) * stride
        distances = box.reshape(-1, 4) * stride
        scores.append(score.reshape(-1))
        boxes.append(np.concatenate([centre - distances[:, :2], centre + distances[:, 2:]], 1))
        points.append(centre[:, None] + point.reshape(-1, 5, 2) * stride)
    chosen = _apart(np.concatenate(scores), np.concatenate(boxes))
    found = np.concatenate(boxes)[chosen] / np.float32(scale), np.concatenate(points)[chosen] / np.float32(scale)
    return found[0].astype(np.float32), found[1].astype(np.float32)


def _apart(scores: NDArray[Any], boxes: NDArray[Any]) -> list[int]:
    """Return the places of the surest boxes, none of which covers much of another."""
    left, top, right, bottom = boxes.T
    areas = np.maximum(right - left, 0) * np.maximum(bottom - top, 0)
    chosen: list[int] = []
    for place in np.argsort(-scores, kind="stable"):
        if scores[place] < _SURE:
            break
        wide = np.minimum(right[place], right[chosen]) - np.maximum(left[place], left[chosen])
        high = np.minimum(bottom[place], bottom[chosen]) - np.maximum(top[place], top[chosen])
        shared = np.maximum(wide, 0) * np.maximum(high, 0)
        if np.all(shared <= _OVERLAP * (areas[place] + areas[chosen] - shared)):
            chosen.append(int(place))
    return chosen


def _vector(path: str, picture: Picture, points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the unit vector of identity of the face with these five points."""
    import cv2

    face = cv2.warpAffine(picture, _onto_face(points), (_FACE_SIDE, _FACE_SIDE))
    found = np.asarray(run_onnx(path, _blob(face, 127.5))[0], np.float32).reshape(-1)
    if found.size != _VECTOR:
        raise UserError(f"tells no faces apart: its output has {found.size} values, not {_VECTOR}", where=path)
    norm = float(np.linalg.norm(found))
    return found / np.float32(norm) if norm > 0 else found


def _onto_face(points: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the turn, scale and shift [2,3] that brings five points closest to where faces have them.

    Least squares over turns and scales, "Least-squares estimation of transformation parameters between two point
    patterns" (Umeyama 1991), in the plane, where it is one division of complex numbers.
    """
    source, target = (points.astype(np.float64), _POINTS.astype(np.float64))
    a, b = (np.ascontiguousarray(side - side.mean(0)).view(np.complex128).ravel() for side in (source, target))
    turn = (np.conj(a) @ b) / max(float((np.conj(a) @ a).real), 1e-9)
    matrix = np.array([[turn.real, -turn.imag], [turn.imag, turn.real]])
    return np.concatenate([matrix, (target.mean(0) - matrix @ source.mean(0))[:, None]], axis=1)


def _blob(picture: NDArray[Any], scale: float) -> NDArray[np.float32]:
    """Return [1,3,H,W] with levels around 0."""
    return ((np.asarray(picture).transpose(2, 0, 1)[None].astype(np.float32) - 127.5) / scale).astype(np.float32)
