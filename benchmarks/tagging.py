"""Tagging: how much of the time the model works, when loader processes decode photographs beside it.

A model of the default format with random weights, patches and blocks of 1x1 convolutions at 448 pixels, tags copies of
the photographs in examples/, enlarged to `--megapixels`, as tag_images_by_wd14_tagger.py does. Two blocks are a small
part of what usual taggers compute. `model busy` is the time inside the model over the whole time, from the start of the
loader processes to the last text file.

    python benchmarks/tagging.py
    python benchmarks/tagging.py --blocks 12 --pictures 48 --workers 1
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.captioning import busy_rows, make_photographs  # noqa: E402
from benchmarks.report import report  # noqa: E402

WIDTH, WIDE, PATCH, TAGS = 768, 3072, 16, 9083


def random_tagger(folder: Path, blocks: int) -> Path:
    """Write model.onnx and selected_tags.csv."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    tensors, nodes = [], [helper.make_node("Transpose", ["picture"], ["x0"], perm=[0, 3, 1, 2])]

    def convolve(source: str, target: str, shape: tuple[int, ...], **attributes: Any) -> None:
        weights = rng.standard_normal(shape, np.float32) / np.float32(np.prod(shape[1:]) ** 0.5)
        tensors.append(numpy_helper.from_array(weights, f"{target}_weight"))
        nodes.append(helper.make_node("Conv", [source, f"{target}_weight"], [target], **attributes))

    convolve("x0", "x1", (WIDTH, 3, PATCH, PATCH), strides=[PATCH, PATCH])
    last = "x1"
    for block in range(blocks):
        convolve(last, f"wide{block}", (WIDE, WIDTH, 1, 1))
        nodes.append(helper.make_node("Tanh", [f"wide{block}"], [f"act{block}"]))
        convolve(f"act{block}", f"out{block}", (WIDTH, WIDE, 1, 1))
        last = f"out{block}"
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["pooled"]))
    convolve("pooled", "head", (TAGS, WIDTH, 1, 1))
    nodes += [helper.make_node("Flatten", ["head"], ["flat"]), helper.make_node("Sigmoid", ["flat"], ["tags"])]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("picture", ["n", 448, 448, 3]), ("tags", ["n", TAGS]))
    ]
    graph = helper.make_graph(nodes, "tagger", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    folder.mkdir()
    onnx.save(model, str(folder / "model.onnx"))
    rows = [f"{number},tag_{number},{9 if number < 4 else 0},1" for number in range(TAGS)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows]), encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--megapixels", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--output")
    args = parser.parse_args()
    from finetune.tag_images_by_wd14_tagger import Options, tag_pictures
    from library.option_parser import parse

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pictures"
        make_photographs(folder, args.pictures, args.megapixels)
        tagger = random_tagger(Path(name) / "tagger", args.blocks)
        words = [folder, "--local_model", tagger, "--batch_size", args.batch]
        found = tag_pictures(parse(Options, [*map(str, words), "--max_data_loader_n_workers", str(args.workers)]))
    report("tagging", busy_rows(found, args), args.output)


if __name__ == "__main__":
    main()
