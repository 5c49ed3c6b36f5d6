"""The table of images: compact, and the same in every process."""

import gc
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scan_helpers import scan, write_image

from library.data.array_file import NotAnArrayFile, pack_arrays, unpack_arrays
from library.data.records import RecordTable, TextColumn, empty_table

TEXTS = st.lists(st.text(alphabet=st.characters(codec=None), max_size=12), max_size=12)


@given(TEXTS, st.data())
def test_text_column_gives_back_its_texts(texts, data):
    column = TextColumn.of(texts)
    assert list(column) == texts
    assert [column[row] for row in range(len(column))] == texts
    rows = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=8)) if texts else []
    assert list(column.take(np.array(rows, np.int64))) == [texts[row] for row in rows]
    assert list(TextColumn.join([column, column])) == texts + texts


def make_table(tmp_path, count=5):
    for index in range(count):
        write_image(tmp_path / "4_x y" / f"ü{index}.png", (64 + index, 64), f"caption {index}")
    return scan(train_data_dir=str(tmp_path)).table


def read_in_child(table, row, queue):
    queue.put((table.record(row), table.repeats.tolist(), type(table.widths.base).__name__))


def test_spawned_process_maps_the_same_table(tmp_path):
    table = make_table(tmp_path)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(table, 3, queue))
    child.start()
    record, repeats, _ = queue.get(timeout=60)
    child.join()
    assert record == table.record(3)
    assert repeats == [4] * 5


def test_pickle_is_small_and_the_file_goes_with_the_table(tmp_path):
    table = make_table(tmp_path)
    data = pickle.dumps(table)
    assert len(data) < 300
    copy = pickle.loads(data)
    assert list(copy) == list(table)
    assert copy.captions() is not None
    assert list(copy.keys()) == list(table.keys())
    path = Path(table.share())
    assert pickle.dumps(copy) == data
    del table
    gc.collect()
    assert not path.exists()
    assert not path.parent.exists()
    assert copy.record(0).caption == "caption 0"


def test_join_and_take(tmp_path):
    table = make_table(tmp_path)
    twice = RecordTable.join([table, empty_table(), table.take(np.array([4, 0]))])
    assert [r.path for r in twice] == [r.path for r in table] + [table.path(4), table.path(0)]
    assert [r.index for r in twice] == list(range(7))
    assert len(empty_table()) == 0
    assert list(pickle.loads(pickle.dumps(empty_table()))) == []


def test_memory_per_image(tmp_path):
    table = make_table(tmp_path, 50)
    numbers, _texts = table.nbytes()
    assert numbers / len(table) <= 100


def test_array_file_refuses_damage():
    data = b"".join(pack_arrays({"a": [1, "x"]}, [("n", np.arange(50)), ("t", np.zeros((3, 2), np.uint8))]))
    header, arrays = unpack_arrays(data, verify=True)
    assert header == {"a": [1, "x"]}
    assert arrays["n"].tolist() == list(range(50))
    assert arrays["t"].shape == (3, 2)
    wrong = 0
    for position in range(len(data)):
        broken = bytearray(data)
        broken[position] ^= 4
        try:
            header, arrays = unpack_arrays(bytes(broken), verify=True)
        except NotAnArrayFile:
            wrong += 1
        else:  # blanks between the parts carry nothing
            assert arrays["n"].tolist() == list(range(50))
            assert header == {"a": [1, "x"]}
    assert wrong > 400
