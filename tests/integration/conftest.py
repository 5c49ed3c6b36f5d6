"""Fixtures of the tests that run whole scripts."""

from __future__ import annotations

import pytest

from tests import support


@pytest.fixture
def train_db():
    """Run train_db.py with a command line; returns the exit status."""
    return support.train_db


@pytest.fixture
def base_options(tiny_sd1, photo_folders, tmp_path):
    """The options that every small training run here starts from."""
    return (
        f"--pretrained_model_name_or_path={tiny_sd1}",
        f"--train_data_dir={photo_folders}",
        f"--output_dir={tmp_path / 'out'}",
        "--output_name=duck",
        "--resolution=64",
        "--min_bucket_reso=64",
        "--learning_rate=1e-3",
        "--max_train_steps=3",
        "--max_data_loader_n_workers=0",
        "--seed=7",
    )
