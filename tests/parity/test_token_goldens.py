"""Token ids and weights equal the golden cases."""

import json
from pathlib import Path

import numpy as np
import pytest

from library.contracts import TokenizerSpec
from library.models.tokenizer import ClipTokenizer

CASES = json.loads((Path(__file__).parent.parent / "golden" / "token_cases.json").read_text(encoding="utf-8"))["cases"]
SPECS = {
    "sd_v1": TokenizerSpec("sd_v1", 49407),
    "sd_v2": TokenizerSpec("sd_v2", 0, "!"),
    "sdxl_te2": TokenizerSpec("sdxl_te2", 0),
}


def rows():
    for number, case in enumerate(CASES):
        for row in case["results"]:
            yield pytest.param(case, row, id=f"{number}-{row['tokenizer']}-{row['max_token_length']}")


def expected_weights(row):
    weights = np.ones(np.shape(row["input_ids"]))
    for chunk, position, weight in row["weights_not_one"]:
        weights[chunk, position] = weight
    return weights


@pytest.mark.parametrize(("case", "row"), rows())
def test_ids_and_weights(case, row):
    weighted = case["kind"] == "weighted"
    tokenizer = ClipTokenizer(SPECS[row["tokenizer"]], row["max_token_length"], weighted=weighted)
    ids, weights = tokenizer.encode(case["caption"])
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, row["input_ids"])
    if not weighted:
        assert weights is None
        return
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, expected_weights(row), atol=2e-6)
    plain, _ = ClipTokenizer(SPECS[row["tokenizer"]], row["max_token_length"]).encode(case["caption"])
    np.testing.assert_array_equal(plain, row["input_ids_unweighted"])
