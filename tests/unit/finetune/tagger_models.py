"""Taggers of a few kilobytes with the structure of the real ones: the mean colour of a picture decides its tags."""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BLUE, GREEN, RED = 0, 1, 2

# (tag, category number, the channel whose mean is its probability, factor)
DEFAULT_LABELS = [
    ("safe", 9, GREEN, 0.9),
    ("sensitive", 9, RED, 0.9),
    ("questionable", 9, BLUE, 0.5),
    ("explicit", 9, BLUE, 0.4),
    ("red_hair", 0, RED, 1.0),
    ("blue_sky", 0, BLUE, 1.0),
    ("green,grass", 0, GREEN, 1.0),
    ("^_^", 0, RED, 0.8),
    ("duck_(costume)_(farm)", 4, RED, 0.6),
]
MAPPED_LABELS = [
    ("general", "Rating", GREEN),
    ("explicit", "Rating", BLUE),
    ("best_quality", "Quality", GREEN),
    ("worst_quality", "Quality", RED),
    ("red_hair", "General", RED),
    ("artist_a", "Artist", RED),
    ("duck_(farm)", "Character", GREEN),
    ("screenshot", "Meta", RED),
]


def weights_of(channels, factors):
    matrix = np.zeros((3, len(channels)), np.float32)
    matrix[channels, np.arange(len(channels))] = factors
    return matrix


def save_model(path: Path, matrix, *, shape, axes, bias=None, clip=True) -> Path:
    """Write mean over `axes`, product with `matrix` [3, tags] and a bias, clipped to 0..1."""
    count = matrix.shape[1]
    bias = np.zeros(count, np.float32) if bias is None else np.asarray(bias, np.float32)
    tensors = [
        numpy_helper.from_array(np.asarray(axes, np.int64), "axes"),
        numpy_helper.from_array(np.asarray(matrix, np.float32), "matrix"),
        numpy_helper.from_array(bias, "bias"),
    ]
    nodes = [
        helper.make_node("ReduceMean", ["picture", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "matrix"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["sum" if clip else "tags"]),
    ]
    if clip:
        tensors += [numpy_helper.from_array(np.float32(end), name) for end, name in ((0, "least"), (1, "most"))]
        nodes.append(helper.make_node("Clip", ["sum", "least", "most"], ["tags"]))
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("picture", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("tags", TensorProto.FLOAT, [shape[0], count])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


def write_tag_list(folder: Path, labels=DEFAULT_LABELS) -> None:
    import csv

    with (folder / "selected_tags.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["tag_id", "name", "category", "count"])
        rows.writerows([number, label[0], label[1], 1] for number, label in enumerate(labels))


def default_tagger(folder: Path, *, labels=DEFAULT_LABELS, batch="batch", side=448) -> Path:
    """Make a tagger of the default format: [batch, row, column, blue green red] in 0..255."""
    matrix = weights_of([label[2] for label in labels], [label[3] / 255 for label in labels])
    save_model(folder / "model.onnx", matrix, shape=[batch, side, side, 3], axes=[1, 2])
    write_tag_list(folder, labels)
    return folder


def mapped_tagger(folder: Path, *, labels=MAPPED_LABELS, batch="batch", side=448) -> Path:
    """Make a tagger of the sub-folder format: [batch, blue green red, row, column] in -1..1, logits of 4 * mean."""
    matrix = weights_of([label[2] for label in labels], [4.0] * len(labels))
    bias = [-0.01 * number for number in range(len(labels))]
    save_model(
        folder / "model_optimized.onnx", matrix, shape=[batch, 3, side, side], axes=[2, 3], bias=bias, clip=False
    )
    mapping = {str(number): {"tag": label[0], "category": label[1]} for number, label in enumerate(labels)}
    (folder / "tag_mapping.json").write_text(json.dumps(mapping), encoding="utf-8")
    return folder
