"""A data set class of the user's own feeds network training as it feeds full training."""

from safetensors import safe_open

from tests.support import train_network


def test_a_network_learns_from_a_class_of_the_users_own(tiny_sd1, tmp_path, monkeypatch):
    (tmp_path / "own_pictures.py").write_text(
        "import torch\n"
        "class Two:\n"
        "    def __init__(self, tokenizer, max_token_length, resolution, debug_dataset):\n"
        "        pass\n"
        "    def __len__(self):\n"
        "        return 2\n"
        "    def __getitem__(self, index):\n"
        "        return {'images': torch.full((1, 3, 64, 64), index * 0.5), 'captions': ['one']}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = {
        "pretrained_model_name_or_path": tiny_sd1,
        "dataset_class": "own_pictures.Two",
        "output_dir": tmp_path / "out",
        "output_name": "own",
        "resolution": 64,
        "network_module": "networks.lora",
        "learning_rate": 1e-2,
        "max_train_steps": 2,
        "max_data_loader_n_workers": 0,
    }
    assert train_network(*(f"--{name}={value}" for name, value in options.items())) == 0
    with safe_open(tmp_path / "out" / "own.safetensors", framework="pt") as file:
        assert file.metadata()["ss_num_train_images"] == "2"
        assert any(file.get_tensor(key).abs().max() > 0 for key in list(file.keys()) if "lora_up" in key)
