"""Names that are not options here: old spellings, options without effect in a script, names of other tools."""

from __future__ import annotations

from typing import NamedTuple

SPELLINGS = {"caption_extention": "caption_extension", "control_net_weights": "control_net_multipliers"}
"""Old spelling -> option. When both are given, the old spelling wins, as it always did."""


class NoEffect(NamedTuple):
    """Why an option does nothing in a script, and whether asking for it must stop the run."""

    reason: str
    refuse: bool


_SCRIPTS = (
    "train_db",
    "fine_tune",
    "train_network",
    "train_textual_inversion",
    "stable_cascade_train_stage_c",
    "stable_cascade_train_stage_b",
    "stable_cascade_train_c_network",
    "stable_cascade_train_c_control_net",
)
_STAGES = ("stable_cascade_train_stage_c", "stable_cascade_train_stage_b")
_CASCADE = (*_STAGES, "stable_cascade_train_c_network", "stable_cascade_train_c_control_net")
_NO_TEXT_CACHE = NoEffect("captions go through the text encoder in every step, since its new vectors are trained", True)
_FEW = NoEffect(
    "the few numbers that are trained stay in float32, and all others have the type of --mixed_precision", False
)
_NO_DOWNLOAD = "the CLIP vocabulary is built in, so there is nothing to download or keep"


def _in_all(reason: str) -> dict[str, NoEffect]:
    return dict.fromkeys(_SCRIPTS, NoEffect(reason, refuse=False))


def _in_cascade(reason: str, *, refuse: bool = False) -> dict[str, NoEffect]:
    return dict.fromkeys(_CASCADE, NoEffect(reason, refuse))


_ONE_ATTENTION = "Stable Cascade has only the attention of PyTorch"
_NO_VELOCITY = "Stable Cascade predicts noise, never velocity"


NO_EFFECT_IN: dict[str, dict[str, NoEffect]] = {
    "fp8_base": {
        **{
            script: NoEffect("it stores frozen weights in 8 bits, and here the weights themselves are trained", True)
            for script in ("train_db", "fine_tune", *_STAGES)
        },
        "stable_cascade_train_c_control_net": NoEffect("stage C is kept in 8 bits for networks alone", True),
    },
    "lowram": _in_all("files are always mapped, and weights go straight from them to the GPU"),
    "tokenizer_cache_dir": {
        **_in_all(_NO_DOWNLOAD),
        "gen_img": NoEffect(_NO_DOWNLOAD, refuse=False),
        "stable_cascade_gen_img": NoEffect(_NO_DOWNLOAD, refuse=False),
    },
    "conditioning_data_dir": {
        script: NoEffect("masks are named by the subsets of --dataset_config (key conditioning_data_dir)", False)
        for script in ("train_db", "train_network", "train_textual_inversion", *_CASCADE)
        if script != "stable_cascade_train_c_control_net"
    },
    "vae": _in_cascade("pictures are encoded by EfficientNet and by stage A"),
    "clip_skip": _in_cascade("the models need what the last layer of the text encoder makes"),
    "zero_terminal_snr": _in_cascade("the schedule of Stable Cascade ends in pure noise as it is"),
    "scale_v_pred_loss_like_noise_pred": _in_cascade(_NO_VELOCITY),
    "v_pred_like_loss": _in_cascade(_NO_VELOCITY),
    "xformers": _in_cascade(_ONE_ATTENTION),
    "mem_eff_attn": _in_cascade(_ONE_ATTENTION),
    "sample_sampler": _in_cascade("samples are drawn by DDPM unless a prompt says otherwise (--ss)"),
    "full_fp16": {"train_textual_inversion": _FEW},
    "full_bf16": {"train_textual_inversion": _FEW},
    "cache_text_encoder_outputs": {"train_textual_inversion": _NO_TEXT_CACHE},
    "cache_text_encoder_outputs_to_disk": {"train_textual_inversion": _NO_TEXT_CACHE},
    "text_encoder_batch_size": {"train_textual_inversion": _NO_TEXT_CACHE},
}
"""Option -> script -> reason. A test holds every option either to be used or to stand here."""

_BY_OWNER = {
    "training with folders or masks (train_db.py, train_network.py, train_textual_inversion.py)": """
        reg_data_dir prior_loss_weight masked_loss conditioning_data_dir""",
    "training networks (train_network.py)": """
        network_module network_dim network_alpha network_dropout network_args network_weights dim_from_weights
        network_train_unet_only network_train_text_encoder_only scale_weight_norms base_weights
        base_weights_multiplier
        unet_lr text_encoder_lr no_metadata training_comment initial_epoch initial_step skip_until_initial_step
        validation_split validation_seed validate_every_n_steps validate_every_n_epochs max_validation_steps
        fp8_base_unet cpu_offload_checkpointing""",
    "training whole models (train_db.py, fine_tune.py)": """
        learning_rate_te use_safetensors""",
    "DreamBooth (train_db.py)": """
        stop_text_encoder_training no_token_padding""",
    "training on metadata (fine_tune.py, train_network.py, train_textual_inversion.py)": """
        in_json dataset_repeats cache_text_encoder_outputs cache_text_encoder_outputs_to_disk
        text_encoder_batch_size""",
    "fine-tuning (fine_tune.py)": """
        train_text_encoder diffusers_xformers""",
    "training with captions that may be dropped or weighted (train_db.py, fine_tune.py, train_network.py)": """
        caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate weighted_captions""",
    "textual inversion (train_textual_inversion.py)": """
        token_string init_word num_vectors_per_token weights use_object_template use_style_template
        save_tensor_name""",
    "ControlNet training": """
        controlnet_model_name_or_path control_net_lr cond_emb_dim""",
    "SDXL training": """
        learning_rate_te1 learning_rate_te2 block_lr fused_optimizer_groups disable_mmap_load_safetensors""",
    "Stable Cascade training (stable_cascade_train_stage_c.py, stable_cascade_train_stage_b.py)": """
        effnet_checkpoint_path text_model_checkpoint_path save_text_model model_version adaptive_loss_weight
        loss_weighting ema_decay ema_start_steps ema_every_n_steps ema_device no_text_mask global_batch_size
        backup_every_n_steps sample_dir wandb_entity no_tf32 fsdp train_text_encoder_only""",
    "training stage C of Stable Cascade (stable_cascade_train_stage_c.py)": """
        stage_c_checkpoint_path previewer_checkpoint_path image_model_checkpoint_path clip_image_cond_rate
        stage_c_dropout effnet_scale""",
    "training stage B of Stable Cascade (stable_cascade_train_stage_b.py)": """
        stage_b_checkpoint_path stage_a_checkpoint_path effnet_dropout_rate""",
    "networks and their words for Stable Cascade (stable_cascade_train_c_network.py)": """
        train_tokens train_tokens_init train_tokens_limit embedding_lr""",
    "ControlNets for Stable Cascade (stable_cascade_train_c_control_net.py)": """
        controlnet_filter controlnet_filter_params controlnet_blocks controlnet_bottleneck_mode
        controlnet_checkpoint_path controlnet_backbone_path""",
    "Stable Diffusion (train_db.py, fine_tune.py, train_network.py, train_textual_inversion.py); Stable Cascade has "
    "--stage_c_checkpoint_path and --stage_b_checkpoint_path": """
        pretrained_model_name_or_path v2 v_parameterization""",
    "training of other model families": """
        clip_l clip_g t5xxl t5xxl_device t5xxl_dtype t5xxl_max_token_length ae save_clip save_t5xxl apply_t5_attn_mask
        apply_lg_attn_mask pos_emb_random_crop_rate enable_scaled_pos_embed clip_l_dropout_rate clip_g_dropout_rate
        t5_dropout_rate sd3_text_encoder_batch_size training_shift weighting_scheme logit_mean logit_std mode_scale
        timestep_sampling sigmoid_scale model_prediction_type discrete_flow_shift guidance_scale blocks_to_swap
        double_blocks_to_swap single_blocks_to_swap blockwise_fused_optimizers flux_fused_backward_pass
        cpu_offload split_mode train_blocks split_qkv train_t5xxl fp8_vl gemma2 gemma2_max_token_length
        use_flash_attn use_sage_attn system_prompt cfg_trunc_ratio renorm_cfg chroma model_type""",
    "generating pictures (gen_img.py)": """
        ckpt from_file from_module prompter_module_args interactive no_preview image_path mask_path images_per_prompt
        outdir sequential_file_name use_original_file_name n_iter sampler vae_slices iter_same_seed shuffle_prompts
        opt_channels_last network_mul network_show_meta network_merge network_merge_n_models network_pre_calc
        network_regional_mask_max_color_codes textual_inversion_embeddings max_embeddings_multiples emb_normalize_mode
        force_scheduler_zero_steps_offset guide_image_path highres_fix_scale highres_fix_steps highres_fix_strength
        highres_fix_save_1st highres_fix_latents_upscaling highres_fix_upscaler highres_fix_upscaler_args
        highres_fix_disable_control_net negative_scale control_net_models control_net_preps control_net_multipliers
        control_net_ratios""",
    "guidance by other models (CLIP, VGG16) and embeddings by layer (XTI), which gen_img.py does without": """
        clip_guidance_scale clip_image_guidance_scale vgg16_guidance_scale vgg16_guidance_layer XTI_embeddings
        replace_clip_l14_336""",
    "the kohya_ss interface": """
        noise_offset_type epoch model_list pretrained_model_name LoRA_type sdxl flux1_checkbox sd3_checkbox
        sdxl_checkbox sdxl_cache_text_encoder_outputs sdxl_no_half_vae additional_parameters
        extra_accelerate_launch_args num_cpu_threads_per_process num_processes num_machines multi_gpu
        gpu_ids main_process_port headless
        reg_data_dir_checkbox save_as_bool logging_dir_checkbox stop_text_encoder_training_pct
        caption_metadata_filename latent_metadata_filename full_path buckets_only generate_caption_database
        generate_image_buckets train_dir image_folder dreambooth use_wandb lr_warmup max_resolution""",
}

ELSEWHERE = {name: owner for owner, names in _BY_OWNER.items() for name in names.split()}
"""Known options of other scripts and tools -> whose they are."""
