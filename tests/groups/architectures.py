"""Tricky parameters of real models, with answers written by hand from the models' sources and papers.

`decay` and `no_decay` are the answers on which the brief and the models' authors leave no choice. `policy`
lists the parameters that are a matter of convention, with the default answer of this project (`=N` or `=D`);
they are left out of accuracy figures. A name that a model does not have is an error in this file.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    target: str
    family: str
    decay: str
    no_decay: str
    policy: str = ""


CASES = [
    # --- vision transformers
    Case(
        "timm:deit_tiny_distilled_patch16_224",
        "ViT",
        decay="patch_embed.proj.weight blocks.0.attn.qkv.weight head.weight head_dist.weight",
        no_decay="cls_token dist_token pos_embed blocks.0.norm1.weight norm.weight head_dist.bias",
    ),
    Case(
        "timm:vit_base_patch16_siglip_224",
        "ViT",
        decay="attn_pool.q.weight attn_pool.kv.weight attn_pool.mlp.fc1.weight patch_embed.proj.weight",
        no_decay="pos_embed attn_pool.norm.weight attn_pool.kv.bias norm.weight",
        policy="attn_pool.latent=N",
    ),
    Case(
        "timm:beit_base_patch16_224",
        "ViT",
        decay="blocks.0.attn.qkv.weight blocks.0.mlp.fc1.weight head.weight",
        no_decay="""
        cls_token blocks.0.gamma_1 blocks.0.gamma_2 blocks.0.attn.q_bias blocks.0.attn.v_bias
        blocks.0.attn.relative_position_bias_table fc_norm.weight
        """,
    ),
    Case(
        "timm:cait_xxs24_224",
        "ViT",
        decay="blocks.0.attn.proj_l.weight blocks.0.attn.proj_w.weight blocks_token_only.0.attn.q.weight",
        no_decay="cls_token pos_embed blocks.0.gamma_1 blocks_token_only.0.gamma_2 blocks.0.attn.proj_l.bias",
    ),
    Case(
        "timm:tnt_s_patch16_224",
        "ViT",
        decay="proj.weight blocks.0.attn_in.qk.weight blocks.0.attn_out.qk.weight",
        no_decay="cls_token patch_pos pixel_pos norm1_proj.weight blocks.0.norm2_proj.weight",
    ),
    Case(
        "timm:crossvit_tiny_240",
        "ViT",
        decay="blocks.0.fusion.0.attn.wq.weight head.0.weight",
        no_decay="""
        pos_embed_0 pos_embed_1 cls_token_0 blocks.0.projs.0.0.weight blocks.0.revert_projs.0.0.weight
        """,
    ),
    Case(
        "timm:samvit_base_patch16",
        "ViT",
        decay="neck.0.weight blocks.0.attn.qkv.weight",
        no_decay="""
        pos_embed blocks.0.attn.rel_pos_h blocks.0.attn.rel_pos_w neck.1.weight blocks.0.norm1.weight
        """,
    ),
    Case(
        "timm:mvitv2_tiny",
        "ViT",
        decay="patch_embed.proj.weight stages.0.blocks.0.attn.qkv.weight head.fc.weight",
        no_decay="stages.0.blocks.0.attn.rel_pos_h stages.0.blocks.0.attn.rel_pos_w norm.weight",
    ),
    Case(
        "transformers:dinov2",
        "ViT",
        decay="""
        embeddings.patch_embeddings.projection.weight encoder.layer.0.mlp.fc1.weight
        encoder.layer.0.attention.q_proj.weight
        """,
        no_decay="""
        embeddings.cls_token embeddings.mask_token embeddings.position_embeddings
        encoder.layer.0.layer_scale1.lambda1 encoder.layer.0.norm1.weight layernorm.weight
        """,
    ),
    Case(
        "transformers:vit_mae",
        "ViT",
        decay="""
        decoder.decoder_embed.weight vit.embeddings.patch_embeddings.projection.weight
        decoder.decoder_pred.weight
        """,
        no_decay="""
        vit.embeddings.cls_token decoder.mask_token decoder.decoder_norm.weight
        vit.layers.0.layernorm_before.weight
        """,
    ),
    # --- windows
    Case(
        "timm:swin_tiny_patch4_window7_224",
        "Swin",
        decay="""
        patch_embed.proj.weight layers.1.downsample.reduction.weight layers.0.blocks.0.attn.qkv.weight
        """,
        no_decay="""
        layers.0.blocks.0.attn.relative_position_bias_table patch_embed.norm.weight
        layers.1.downsample.norm.weight norm.weight
        """,
    ),
    Case(
        "timm:swinv2_tiny_window8_256",
        "Swin",
        decay="layers.1.downsample.reduction.weight head.fc.weight layers.0.blocks.0.attn.qkv.weight",
        no_decay="""
        layers.0.blocks.0.attn.logit_scale layers.0.blocks.0.attn.q_bias layers.0.blocks.0.attn.v_bias
        layers.0.blocks.0.norm1.weight layers.0.blocks.0.attn.cpb_mlp.0.bias
        """,
    ),
    # --- attention with convolutions
    Case(
        "timm:xcit_nano_12_p16_224",
        "XCiT",
        decay="patch_embed.proj.0.0.weight blocks.0.local_mp.conv1.weight blocks.0.attn.qkv.weight",
        no_decay="""
        cls_token blocks.0.attn.temperature blocks.0.gamma1 blocks.0.gamma3 blocks.0.local_mp.bn.weight
        patch_embed.proj.0.1.weight
        """,
    ),
    Case(
        "timm:edgenext_xx_small",
        "XCiT",
        decay="stem.0.weight stages.1.blocks.1.convs.0.weight stages.1.downsample.1.weight",
        no_decay="""
        stages.1.blocks.1.xca.temperature stages.1.blocks.1.gamma_xca stages.0.blocks.0.gamma
        stages.1.blocks.1.norm_xca.weight stages.1.downsample.0.weight
        """,
        policy="stages.1.blocks.1.pos_embd.token_projection.weight=D",
    ),
    Case(
        "timm:levit_128s",
        "LeViT",
        decay="stem.conv1.linear.weight stages.0.blocks.0.attn.qkv.linear.weight head.linear.weight",
        no_decay="""
        stages.0.blocks.0.attn.attention_biases stages.1.downsample.attn_downsample.attention_biases
        stages.0.blocks.0.attn.qkv.bn.weight head.bn.weight
        """,
    ),
    Case(
        "timm:visformer_tiny",
        "LeViT",
        decay="stem.0.weight stage1.0.mlp.conv2.weight",
        no_decay="pos_embed1 pos_embed2 pos_embed3 patch_embed1.norm.weight stem.1.weight",
    ),
    Case(
        "timm:coat_lite_tiny",
        "LeViT",
        decay="patch_embed1.proj.weight head.weight",
        no_decay="cls_token1 cls_token2 cls_token4 patch_embed1.norm.weight",
        policy="crpe1.conv_list.0.weight=D",
    ),
    Case(
        "timm:botnet26t_256",
        "BoTNet",
        decay="stages.2.1.self_attn.qkv.weight stem.conv1.conv.weight stages.0.0.shortcut.conv.weight",
        no_decay="""
        stages.2.1.self_attn.pos_embed.height_rel stages.2.1.self_attn.pos_embed.width_rel
        stages.2.1.post_attn.weight stem.conv1.bn.weight stages.0.0.shortcut.bn.weight
        """,
    ),
    Case(
        "timm:caformer_s18",
        "MetaFormer",
        decay="""
        stages.0.blocks.0.token_mixer.pwconv1.weight stages.0.blocks.0.token_mixer.dwconv.weight
        stem.conv.weight
        """,
        no_decay="""
        stages.0.blocks.0.token_mixer.act1.scale stages.0.blocks.0.token_mixer.act1.bias
        stages.2.blocks.0.res_scale1.scale stages.1.downsample.norm.weight head.norm.weight
        """,
    ),
    Case(
        "timm:resmlp_12_224",
        "MLP",
        decay="blocks.0.linear_tokens.weight blocks.0.mlp_channels.fc1.weight head.weight",
        no_decay="blocks.0.norm1.alpha blocks.0.norm1.beta norm.alpha blocks.0.ls1 blocks.0.ls2",
    ),
    # --- convolutions
    Case(
        "timm:resnet50",
        "ConvNet",
        decay="conv1.weight layer1.0.downsample.0.weight fc.weight",
        no_decay="bn1.weight layer1.0.bn2.weight layer1.0.downsample.1.weight fc.bias",
    ),
    Case(
        "timm:efficientnet_b0",
        "ConvNet",
        decay="conv_stem.weight blocks.0.0.conv_dw.weight blocks.0.0.se.conv_reduce.weight classifier.weight",
        no_decay="bn1.weight blocks.0.0.bn1.weight blocks.0.0.se.conv_reduce.bias",
    ),
    Case(
        "timm:convnextv2_atto",
        "ConvNet",
        decay="stem.0.weight stages.0.blocks.0.conv_dw.weight stages.1.downsample.1.weight",
        no_decay="""
        stages.0.blocks.0.mlp.grn.weight stages.0.blocks.0.mlp.grn.bias stages.0.blocks.0.norm.weight
        stages.1.downsample.0.weight stem.1.weight
        """,
    ),
    Case(
        "transformers:convnextv2",
        "ConvNet",
        decay="""
        embeddings.patch_embeddings.weight encoder.stages.0.layers.0.pwconv1.weight
        encoder.stages.0.layers.0.dwconv.weight
        """,
        no_decay="""
        encoder.stages.0.layers.0.grn.weight encoder.stages.0.layers.0.grn.bias
        encoder.stages.1.downsampling_layer.0.weight layernorm.weight
        """,
    ),
    Case(
        "timm:dm_nfnet_f0",
        "ConvNet",
        decay="stem.conv1.weight stages.0.0.downsample.conv.weight final_conv.weight",
        no_decay="""
        stem.conv1.gain stages.0.0.conv2b.gain stages.0.0.skipinit_gain final_conv.gain stem.conv1.bias
        """,
    ),
    Case(
        "timm:fastvit_t8",
        "ConvNet",
        decay="stem.0.conv_scale.conv.weight stages.0.blocks.0.mlp.conv.conv.weight head.fc.weight",
        no_decay="""
        stages.0.blocks.0.layer_scale.gamma stages.0.blocks.0.token_mixer.layer_scale.gamma
        stem.0.conv_scale.bn.weight stem.2.identity.weight
        """,
    ),
    # --- encoders and encoder-decoders of text
    Case(
        "transformers:bert",
        "BERT",
        decay="bert.encoder.layer.0.attention.self.query.weight cls.predictions.transform.dense.weight",
        no_decay="""
        bert.embeddings.position_embeddings.weight bert.embeddings.LayerNorm.weight cls.predictions.bias
        cls.predictions.transform.LayerNorm.weight bert.encoder.layer.0.output.LayerNorm.bias
        """,
        policy="bert.embeddings.word_embeddings.weight=N bert.embeddings.token_type_embeddings.weight=N",
    ),
    Case(
        "transformers:xlnet",
        "BERT",
        decay="""
        transformer.layer.0.rel_attn.q transformer.layer.0.rel_attn.o transformer.layer.0.rel_attn.r
        transformer.layer.0.ff.layer_1.weight
        """,
        no_decay="""
        transformer.mask_emb transformer.layer.0.rel_attn.r_r_bias transformer.layer.0.rel_attn.r_w_bias
        transformer.layer.0.rel_attn.layer_norm.weight lm_loss.bias
        """,
        policy="transformer.word_embedding.weight=N transformer.layer.0.rel_attn.seg_embed=N",
    ),
    Case(
        "transformers:funnel",
        "BERT",
        decay="""
        funnel.encoder.blocks.0.0.attention.r_kernel funnel.encoder.blocks.0.0.attention.q_head.weight
        """,
        no_decay="""
        funnel.encoder.blocks.0.0.attention.r_w_bias funnel.encoder.blocks.0.0.attention.r_s_bias
        funnel.embeddings.layer_norm.weight funnel.encoder.blocks.0.0.attention.layer_norm.weight
        """,
    ),
    Case(
        "transformers:t5",
        "T5",
        decay="""
        encoder.block.0.layer.0.SelfAttention.q.weight encoder.block.0.layer.1.DenseReluDense.wi.weight
        decoder.block.0.layer.1.EncDecAttention.o.weight
        """,
        no_decay="""
        encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight
        encoder.block.0.layer.0.layer_norm.weight encoder.final_layer_norm.weight
        decoder.final_layer_norm.weight
        """,
        policy="shared.weight=N",
    ),
    # --- decoders of text
    Case(
        "transformers:gpt2",
        "GPT",
        decay="transformer.h.0.attn.c_attn.weight transformer.h.0.mlp.c_proj.weight",
        no_decay="""
        transformer.wpe.weight transformer.ln_f.weight transformer.h.0.ln_1.weight
        transformer.h.0.attn.c_attn.bias
        """,
        policy="transformer.wte.weight=N",
    ),
    Case(
        "transformers:imagegpt",
        "GPT",
        decay="h.0.attn.c_attn.weight h.0.mlp.c_fc.weight",
        no_decay="h.0.ln_1.weight h.0.ln_2.weight ln_f.weight wpe.weight",
        policy="wte.weight=N",
    ),
    Case(
        "transformers:llama",
        "Llama",
        decay="model.layers.0.self_attn.q_proj.weight model.layers.0.mlp.gate_proj.weight",
        no_decay="""
        model.layers.0.input_layernorm.weight model.layers.0.post_attention_layernorm.weight
        model.norm.weight
        """,
        policy="model.embed_tokens.weight=N lm_head.weight=D",
    ),
    Case(
        "transformers:gemma2",
        "Llama",
        decay="model.layers.0.mlp.down_proj.weight model.layers.0.self_attn.o_proj.weight",
        no_decay="",
        policy="""
        model.embed_tokens.weight=N model.layers.0.input_layernorm.weight=N
        model.layers.0.pre_feedforward_layernorm.weight=N model.norm.weight=N
        """,
    ),
    Case(
        "transformers:qwen2_5_vl",
        "Qwen-VL",
        decay="""
        model.visual.patch_embed.proj.weight model.visual.merger.mlp.0.weight
        model.visual.blocks.0.mlp.gate_proj.weight
        """,
        no_decay="""
        model.visual.blocks.0.norm1.weight model.visual.blocks.0.norm2.weight
        model.visual.merger.ln_q.weight model.language_model.layers.0.input_layernorm.weight
        model.visual.blocks.0.mlp.gate_proj.bias
        """,
    ),
    # --- mixtures of experts
    Case(
        "transformers:qwen3_moe",
        "MoE",
        decay="""
        model.layers.0.mlp.experts.gate_up_proj model.layers.0.mlp.experts.down_proj
        model.layers.0.mlp.gate.weight
        """,
        no_decay="""
        model.layers.0.self_attn.q_norm.weight model.layers.0.self_attn.k_norm.weight model.norm.weight
        """,
    ),
    Case(
        "transformers:gpt_oss",
        "MoE",
        decay="""
        model.layers.0.mlp.router.weight model.layers.0.mlp.experts.gate_up_proj
        model.layers.0.mlp.experts.down_proj
        """,
        no_decay="""
        model.layers.0.self_attn.sinks model.layers.0.mlp.router.bias
        model.layers.0.mlp.experts.gate_up_proj_bias model.layers.0.mlp.experts.down_proj_bias
        model.layers.0.input_layernorm.weight
        """,
    ),
    # --- state-space and recurrent models
    Case(
        "transformers:mamba",
        "SSM",
        decay="""
        backbone.layers.0.mixer.in_proj.weight backbone.layers.0.mixer.x_proj.weight
        backbone.layers.0.mixer.dt_proj.weight
        """,
        no_decay="""
        backbone.layers.0.mixer.A_log backbone.layers.0.mixer.D backbone.layers.0.norm.weight
        backbone.norm_f.weight backbone.layers.0.mixer.dt_proj.bias
        """,
        policy="backbone.layers.0.mixer.conv1d.weight=D backbone.embeddings.weight=N",
    ),
    Case(
        "transformers:zamba",
        "SSM",
        decay="""
        model.layers.0.mamba.x_proj_weight model.layers.0.mamba.dt_proj_weight
        model.layers.0.mamba.in_proj.weight
        """,
        no_decay="""
        model.layers.0.mamba.A_log model.layers.0.mamba.D model.layers.0.mamba.dt_proj_bias
        model.layers.0.input_layernorm.weight model.final_layernorm.weight
        """,
    ),
    Case(
        "transformers:qwen3_next",
        "SSM",
        decay="""
        model.layers.0.linear_attn.in_proj_qkvz.weight model.layers.0.linear_attn.in_proj_ba.weight
        model.layers.0.mlp.shared_expert_gate.weight model.layers.0.mlp.gate.weight
        """,
        no_decay="""
        model.layers.0.linear_attn.A_log model.layers.0.linear_attn.dt_bias
        model.layers.0.linear_attn.norm.weight
        """,
        policy="model.layers.3.self_attn.q_norm.weight=N model.norm.weight=N",
    ),
    Case(
        "transformers:rwkv",
        "RWKV",
        decay="rwkv.blocks.0.attention.receptance.weight rwkv.blocks.0.attention.output.weight",
        no_decay="""
        rwkv.blocks.0.attention.time_decay rwkv.blocks.0.attention.time_first
        rwkv.blocks.0.attention.time_mix_key rwkv.blocks.0.feed_forward.time_mix_receptance
        rwkv.blocks.0.ln1.weight rwkv.blocks.0.pre_ln.weight rwkv.ln_out.weight
        """,
        policy="rwkv.embeddings.weight=N head.weight=D",
    ),
    Case(
        "transformers:recurrent_gemma",
        "RWKV",
        decay="""
        model.layers.0.temporal_block.rg_lru.input_gate_weight
        model.layers.0.temporal_block.rg_lru.recurrent_gate_weight
        model.layers.0.temporal_block.linear_y.weight
        """,
        no_decay="""
        model.layers.0.temporal_block.rg_lru.recurrent_param
        model.layers.0.temporal_block.rg_lru.input_gate_bias
        model.layers.0.temporal_block.rg_lru.recurrent_gate_bias
        """,
    ),
    # --- speech and sound
    Case(
        "transformers:whisper",
        "Speech",
        decay="model.decoder.layers.0.fc1.weight model.decoder.layers.0.encoder_attn.k_proj.weight",
        no_decay="""
        model.decoder.embed_positions.weight model.decoder.layers.0.encoder_attn_layer_norm.weight
        model.decoder.layer_norm.weight
        """,
        policy="model.decoder.embed_tokens.weight=N",
    ),
    Case(
        "transformers:wav2vec2",
        "Speech",
        decay="""
        wav2vec2.feature_extractor.conv_layers.0.conv.weight quantizer.weight_proj.weight
        wav2vec2.feature_projection.projection.weight
        """,
        no_decay="""
        wav2vec2.masked_spec_embed wav2vec2.feature_extractor.conv_layers.0.layer_norm.weight
        wav2vec2.encoder.layers.0.final_layer_norm.weight wav2vec2.encoder.pos_conv_embed.conv.bias
        """,
        policy="""
        wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0=N
        wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1=D quantizer.codevectors=N
        """,
    ),
    Case(
        "transformers:univnet",
        "Speech",
        decay="""
        resblocks.0.kernel_predictor.bias_conv.weight resblocks.0.kernel_predictor.kernel_conv.weight
        conv_pre.weight conv_post.weight
        """,
        no_decay="resblocks.0.kernel_predictor.bias_conv.bias resblocks.0.kernel_predictor.kernel_conv.bias",
    ),
    Case(
        "diffusers:AutoencoderOobleck",
        "Speech",
        decay="encoder.conv1.weight_v encoder.block.0.res_unit1.conv1.weight_v",
        no_decay="""
        encoder.block.0.res_unit1.snake1.alpha encoder.block.0.res_unit1.snake1.beta encoder.snake1.alpha
        encoder.conv1.bias
        """,
        policy="encoder.conv1.weight_g=N",
    ),
    # --- images and text, detection, segmentation
    Case(
        "transformers:clip",
        "CLIP",
        decay="""
        vision_model.embeddings.patch_embedding.weight visual_projection.weight text_projection.weight
        """,
        no_decay="""
        logit_scale text_model.embeddings.position_embedding.weight vision_model.embeddings.class_embedding
        vision_model.embeddings.position_embedding.weight vision_model.pre_layrnorm.weight
        text_model.encoder.layers.0.layer_norm1.weight
        """,
        policy="text_model.embeddings.token_embedding.weight=N",
    ),
    Case(
        "transformers:siglip",
        "CLIP",
        decay="""
        text_model.head.weight vision_model.embeddings.patch_embedding.weight
        vision_model.head.attention.in_proj_weight
        """,
        no_decay="""
        logit_scale logit_bias vision_model.head.probe vision_model.head.attention.in_proj_bias
        text_model.final_layer_norm.weight
        """,
    ),
    Case(
        "transformers:blip-2",
        "CLIP",
        decay="""
        vision_model.embeddings.patch_embedding.weight vision_model.encoder.layers.0.self_attn.qkv.weight
        """,
        no_decay="""
        vision_model.embeddings.class_embedding vision_model.embeddings.position_embedding
        vision_model.encoder.layers.0.layer_norm1.weight qformer.layernorm.weight
        """,
        policy="query_tokens=N",
    ),
    Case(
        "transformers:detr",
        "Detection",
        decay="class_labels_classifier.weight bbox_predictor.layers.0.weight model.input_projection.weight",
        no_decay="""
        model.encoder.layers.0.self_attn_layer_norm.weight class_labels_classifier.bias
        model.decoder.layernorm.weight
        """,
        policy="model.query_position_embeddings.weight=N",
    ),
    Case(
        "transformers:sam",
        "Detection",
        decay="""
        vision_encoder.patch_embed.projection.weight prompt_encoder.mask_embed.conv1.weight
        vision_encoder.neck.conv1.weight
        """,
        no_decay="""
        vision_encoder.pos_embed vision_encoder.layers.0.attn.rel_pos_h
        vision_encoder.layers.0.attn.rel_pos_w vision_encoder.neck.layer_norm1.weight
        prompt_encoder.mask_embed.layer_norm1.weight
        """,
        policy="""
        mask_decoder.mask_tokens.weight=N mask_decoder.iou_token.weight=N
        prompt_encoder.no_mask_embed.weight=N
        """,
    ),
    # --- diffusion
    Case(
        "diffusers:FluxTransformer2DModel",
        "Diffusion",
        decay="""
        transformer_blocks.0.norm1.linear.weight single_transformer_blocks.0.norm.linear.weight
        norm_out.linear.weight x_embedder.weight time_text_embed.timestep_embedder.linear_1.weight
        """,
        no_decay="""
        transformer_blocks.0.attn.norm_q.weight transformer_blocks.0.attn.norm_added_k.weight
        transformer_blocks.0.norm1.linear.bias
        """,
    ),
    Case(
        "diffusers:SD3Transformer2DModel",
        "Diffusion",
        decay="""
        pos_embed.proj.weight transformer_blocks.0.norm1.linear.weight
        transformer_blocks.0.norm1_context.linear.weight context_embedder.weight norm_out.linear.weight
        """,
        no_decay="pos_embed.proj.bias transformer_blocks.0.norm1.linear.bias",
    ),
    Case(
        "diffusers:UNet2DConditionModel",
        "Diffusion",
        decay="time_embedding.linear_1.weight down_blocks.0.resnets.0.time_emb_proj.weight conv_in.weight",
        no_decay="""
        down_blocks.0.attentions.0.norm.weight down_blocks.0.resnets.0.norm1.weight
        down_blocks.0.attentions.0.transformer_blocks.0.norm1.weight
        """,
    ),
]
