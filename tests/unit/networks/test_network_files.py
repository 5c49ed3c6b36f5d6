"""What comes back from a network's file: values, ranks and alphas; and what is refused or said about it."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import attached, outputs, small_models

from library.errors import UserError
from networks import lora


@pytest.fixture
def models():
    return small_models()


@pytest.fixture
def saved(models, tmp_path):
    """A file with 3x3 convolutions, and the outputs with its network."""
    network = attached(lora, models, dim=4, alpha=2.0, conv_dim="2", conv_alpha="1")
    path = tmp_path / "saved.safetensors"
    network.save_weights(path, None, {"ss_network_module": "networks.lora"})
    return path, [tensor.detach() for tensor in outputs(models)]


def fresh_network(dim=4, alpha=2.0, **kwargs):
    models = small_models()
    return models, attached(lora, models, dim=dim, alpha=alpha, filled=False, **kwargs)


def rewritten(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


def close(found, wanted):
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_loading_what_was_saved_gives_the_same_outputs(saved):
    models, network = fresh_network(conv_dim="2", conv_alpha="1")
    found = network.load_weights(saved[0])
    assert found.startswith(f"weights for {len(network.adapters)} of {len(network.adapters)}")
    close(outputs(models), saved[1])


def test_a_file_is_safetensors_with_hashes_or_a_pickle(saved, models, tmp_path):
    from safetensors import safe_open

    with safe_open(saved[0], "pt") as file:
        assert {"ss_network_module", "sshs_model_hash", "sshs_legacy_hash"} <= set(file.metadata())
    _, network = fresh_network(conv_dim="2", conv_alpha="1")
    network.load_weights(saved[0])
    network.save_weights(tmp_path / "half.ckpt", torch.float16, None)
    stored = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert set(stored) == set(load_file(saved[0]))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


def test_the_alpha_of_the_file_counts(saved, caplog):
    models, network = fresh_network(alpha=4.0, conv_dim="2", conv_alpha="1")
    with caplog.at_level(logging.WARNING):
        network.load_weights(saved[0])
    assert "alpha" in caplog.text
    assert "0.5, not 1" in caplog.text
    close(outputs(models), saved[1])
    assert {float(adapter.alpha) for adapter in network.text_adapters} == {2.0}


def test_without_an_alpha_the_rank_stands_for_it(saved):
    def drop(tensors):
        for name in [name for name in tensors if name.endswith(".alpha")]:
            del tensors[name]

    _, network = fresh_network(conv_dim="2", conv_alpha="1")
    network.load_weights(rewritten(saved[0], drop))
    assert {adapter.scale for adapter in network.adapters} == {1.0}
    assert {float(adapter.alpha) for adapter in network.adapters} == {4.0, 2.0}


def test_alphas_may_be_whole_numbers(saved):
    def whole(tensors):
        for name in tensors:
            if name.endswith(".alpha"):
                tensors[name] = tensors[name].to(torch.int64)

    models, network = fresh_network(alpha=1, conv_dim="2")
    network.load_weights(rewritten(saved[0], whole))
    close(outputs(models), saved[1])


def test_states_restore_the_scale_with_the_alpha(saved):
    models, network = fresh_network(alpha=1.0, conv_dim="2", conv_alpha="2")
    network.load_state_dict(load_file(saved[0]), strict=True)
    close(outputs(models), saved[1])


def test_partial_files_load_and_say_so(saved):
    def halve(tensors):
        for name in [name for name in tensors if name.startswith("lora_te_")]:
            del tensors[name]

    models, network = fresh_network(conv_dim="2", conv_alpha="1")
    found = network.load_weights(rewritten(saved[0], halve))
    assert f"weights for {len(network.unet_adapters)} of {len(network.adapters)} layers" in found
    torch.testing.assert_close(outputs(models)[1], saved[1][1])
    torch.testing.assert_close(outputs(models)[0], outputs(small_models())[0])


def test_modules_without_a_layer_are_listed(saved, caplog):
    _, network = fresh_network()
    with caplog.at_level(logging.WARNING):
        network.load_weights(saved[0])
    assert "9 modules have no layer" in caplog.text
    assert "lora_unet_down_blocks_0_resnets_0_" in caplog.text


def test_a_file_with_no_matching_layer_is_an_error(tmp_path):
    name = "lora_unet_down_blocks_2_attentions_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "other.safetensors")
    _, network = fresh_network()
    with pytest.raises(UserError, match=f"other.safetensors: none of its 1 modules .*{name}"):
        network.load_weights(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="none of its 1 modules"):
        lora.create_network_from_weights(1.0, tmp_path / "other.safetensors", None, *small_models())


def test_another_rank_is_an_error_that_names_both(saved):
    _, network = fresh_network(dim=8, conv_dim="2")
    with pytest.raises(UserError, match=r"is \[4, 8\] in the file, but \[8, 8\] here .*more.*--dim_from_weights"):
        network.load_weights(saved[0])


def test_a_file_for_sd2_is_refused_by_a_network_for_sd1(saved, tmp_path):
    def as_sd2(tensors):
        for name in tensors:
            if "proj_in.lora" in name or "proj_out.lora" in name:
                tensors[name] = tensors[name].flatten(1).contiguous()

    _, network = fresh_network(conv_dim="2")
    with pytest.raises(UserError, match="made for Stable Diffusion 2"):
        network.load_weights(rewritten(saved[0], as_sd2))


def test_ranks_from_a_file_keep_the_other_arguments(saved):
    models = small_models()
    arguments = {"dropout": "0.1", "rank_dropout": "0.2", "module_dropout": "0.3", "loraplus_lr_ratio": "4"}
    network, tensors = lora.create_network_from_weights(1.0, saved[0], None, *models, **arguments)
    assert set(tensors) == set(load_file(saved[0]))
    assert {adapter.dropouts for adapter in network.adapters} == {lora.Dropouts(0.1, 0.2, 0.3)}
    assert {(adapter.rank, float(adapter.alpha)) for adapter in network.adapters} == {(4, 2.0), (2, 1.0)}
    network.apply_to(*models, True, True)
    network.load_weights(saved[0])
    network.eval()
    close(outputs(models), saved[1])
    groups, names = network.prepare_optimizer_params(1e-4, 1e-3, 1e-5)
    assert names == ["textencoder", "textencoder plus", "unet", "unet plus"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 4e-4, 1e-3, 4e-3])


def test_a_network_for_pictures_leaves_nothing_out(saved):
    network, tensors = lora.create_network_from_weights(
        0.5, saved[0], None, *small_models(), for_inference=True, dropout="0.5"
    )
    assert not network.uses_global_randomness
    again, _ = lora.create_network_from_weights(0.5, None, None, *small_models(), weights_sd=tensors)
    assert [a.name for a in again.adapters] == [a.name for a in network.adapters]
    assert {adapter.multiplier for adapter in network.adapters} == {0.5}


def test_another_kind_of_file_is_an_error(tmp_path):
    name = "lora_unet_mid_block_attentions_0_to_q"
    factors = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)}
    save_file({f"{name}.{key}": torch.ones(shape) for key, shape in factors.items()}, tmp_path / "loha.safetensors")
    with pytest.raises(UserError, match="hada_w1_a"):
        lora.create_network_from_weights(1.0, tmp_path / "loha.safetensors", None, *small_models())
    _, network = fresh_network()
    with pytest.raises(UserError, match="another kind of network"):
        network.load_weights(tmp_path / "loha.safetensors")


def test_a_convolution_in_cp_form_is_no_file_to_go_on_with(tmp_path):
    name = "lora_unet_mid_block_resnets_0_conv1"
    shapes = {"lora_down": (2, 8, 1, 1), "lora_mid": (2, 2, 3, 3), "lora_up": (8, 2, 1, 1)}
    save_file({f"{name}.{key}.weight": torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "cp.safetensors")
    with pytest.raises(UserError, match=f"{name} is of a kind .*lora_mid.weight"):
        lora.create_network_from_weights(1.0, tmp_path / "cp.safetensors", None, *small_models())


def test_what_changes_nothing_is_left_out_until_values_come():
    """A state that is resumed may hold what a file once brought to layers that are not trained."""
    stored = attached(lora, small_models()).state_dict()
    models = small_models()
    network = attached(lora, models, filled=False)
    wanted = outputs(models)
    network.prepare_optimizer_params(None, 0.0, 1e-3)
    assert not any(adapter.attached for adapter in network.unet_adapters)
    assert all(adapter.attached for adapter in network.text_adapters)
    network.load_state_dict({name: tensor for name, tensor in stored.items() if "mid_block" in name}, strict=False)
    awake = {adapter.name for adapter in network.unet_adapters if adapter.attached}
    assert awake == {adapter.name for adapter in network.unet_adapters if "mid_block" in adapter.name}
    assert not torch.equal(outputs(models)[1], wanted[1])
