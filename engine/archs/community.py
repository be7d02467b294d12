"""Networks that the engine recognises by their tensors but has no code of: to name them, or to run them by spandrel.

Holds one table. The names are those of the published code; spandrel (https://github.com/chaiNNer-org/spandrel) loads most
of these networks.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

SPANDREL = "open it with spandrel, the loader of chaiNNer"
CHAINNER = "open it with chaiNNer"
"""Advice for networks that draw random noise, restore cropped faces, or crop the picture."""

EXTRA = "open it with spandrel and its package spandrel_extra_arches"
RESSELT = "open it with the Python package resselt"
GENERATOR = "name the generator's file, such as net_g_latest.pth"


@dataclass(frozen=True, slots=True)
class Signature:
    """One line of the table."""

    name: str
    """Name of the architecture in the community."""
    tensors: tuple[str, ...]
    """Tensors that it has, and that no network of a later line has all of."""
    advice: str = SPANDREL
    """Advice about the file."""
    grid: int = 1
    """Grid in pixels on which tiles of the network by spandrel may begin, where neither its modules nor spandrel tell."""

    @property
    def is_in_spandrel(self) -> bool:
        """Whether spandrel builds it."""
        return self.advice == SPANDREL


SIGNATURES = (
    # Enlargement.
    Signature("HAT", ("conv_first.weight", "layers.0.residual_group.overlap_attn.qkv.weight")),
    Signature("DRCT", ("layers.0.swin1.attn.relative_position_bias_table", "layers.0.adjust1.weight")),
    Signature("ATD", ("layers.0.residual_group.td", "layers.0.residual_group.layers.0.sigma")),
    Signature("DAT", ("before_RG.1.weight", "layers.0.blocks.0.attn.spatial_interaction.0.weight")),
    Signature("RGT", ("before_RG.1.weight", "layers.0.blocks.0.attn.get_v.weight")),
    Signature("Swin2SR", ("conv_first.weight", "layers.0.residual_group.blocks.0.attn.cpb_mlp.0.weight")),
    Signature("GRL", ("norm_start.weight", "layers.0.blocks.0.attn.window_attn.attn_transform.logit_scale")),
    Signature("CRAFT", ("layers.0.residual_group.hf_blocks.0.attn.temperature",)),
    Signature("OmniSR", ("residual_layer.0.residual_layer.0.layer.0.fn.0.weight",)),
    Signature("PLKSR", ("feats.1.refine.weight", "feats.1.channe_mixer.0.weight")),
    Signature("RealPLKSR", ("feats.1.refine.weight", "feats.1.channel_mixer.0.weight")),
    Signature("MoSR", ("gblocks.0.weight", "gblocks.1.conv.weight")),
    Signature("MoSRv2", ("to_img.MetaUpsample", "gblocks.1.gamma"), RESSELT),
    Signature("MoESR", ("in_to_dim.weight", "blocks.0.blocks.0.conv.dwconv_hw.weight")),
    Signature("SAFMN", ("to_feat.weight", "feats.0.safm.mfr.0.weight")),
    Signature("SAFMNBCIE", ("to_feat.1.weight", "feats.0.layers.0.safm.mfr.0.weight")),
    Signature("RCAN", ("tail.1.weight", "body.0.body.0.body.3.conv_du.0.weight")),
    Signature("FDAT", ("upsampler.MetaUpsample", "groups.0.blocks.0.inter.cg.1.weight")),
    Signature("SeemoRe", ("body.0.local_block.block.agg_conv.0.weight",)),
    Signature("RealCUGAN", ("unet1.conv1.conv.0.weight", "unet2.conv2.seblock.conv1.weight")),
    Signature("Swift-SRGAN", ("initial.cnn.depthwise.weight",)),
    Signature("DITN", ("UFONE.0.ITLs.0.attn.temperature",)),
    Signature("DCTLSA", ("fea_conv.weight", "B1.body.0.transformer_body.0.blocks.0.attn.qkv.weight")),
    Signature("MM-RealSR", ("body.0.rdb1.conv1.weight", "am_list.0.fc.0.weight")),
    Signature("AuraSR", ("final_res_block.block1.proj.weights",), CHAINNER),
    Signature("SRFormer", ("layers.0.residual_group.blocks.0.attn.aligned_relative_position_index",), EXTRA),
    Signature("SPANPlus", ("feats.0.eval_conv.weight",), RESSELT),
    Signature("RTMoSR", ("body.0.fc1.conv_3x3_rep.weight", "to_img.0.conv_3x3_rep.weight"), RESSELT),
    Signature("GateRV3", ("gater_encode.0.gated.0.gamma0", "span_block0.c1_r.eval_conv.weight"), RESSELT),
    Signature("FlexNet", ("short_cut.block.0.weight", "in_to_feat.weight"), RESSELT),
    # Restoration at the size of the picture.
    Signature("SCUNet", ("m_head.0.weight", "m_down1.0.trans_block.ln1.weight"), grid=64),
    Signature("FBCNN", ("m_head.weight", "qf_pred.0.res.0.weight")),
    Signature("DRUNet", ("m_head.weight", "m_body.0.res.0.weight")),
    Signature("DnCNN", ("model.0.weight", "model.2.weight", "model.6.weight", "model.8.weight", "model.14.weight")),
    Signature("DnCNN", ("model.0.weight", "model.3.running_mean")),
    Signature("KBNet", ("intro.weight", "middle_blks.0.attgamma")),
    Signature("KBNet", ("patch_embed.proj.weight", "encoder_level1.0.attn.ga1")),
    Signature("NAFNet", ("intro.weight", "middle_blks.0.sca.1.weight")),  # KBNet has these too
    Signature("Restormer", ("patch_embed.proj.weight", "encoder_level1.0.attn.qkv_dwconv.weight"), EXTRA),
    Signature("FFTformer", ("encoder_level1.0.ffn.fft",)),
    Signature("Uformer", ("input_proj.proj.0.weight", "encoderlayer_0.blocks.0.norm1.weight")),
    Signature("MixDehazeNet", ("layer1.blocks.0.conv3_19.weight",)),
    Signature("RetinexFormer", ("body.0.estimator.conv1.weight",)),
    Signature("HVI-CIDNet", ("HVE_block0.1.weight",)),
    Signature("IPT", ("body.encoder.layers.0.self_attn.in_proj_weight", "head.0.0.weight"), CHAINNER),
    Signature("LaMa", ("model.1.bn_l.running_mean",)),
    Signature("LaMa", ("generator.model.1.bn_l.running_mean",)),
    Signature("GFPGAN", ("toRGB.0.weight", "stylegan_decoder.style_mlp.1.weight"), CHAINNER),
    Signature("RestoreFormer", ("quantize.embedding.weight", "encoder.conv_in.weight"), CHAINNER),
    Signature("CodeFormer", ("quantize.embedding.weight", "position_emb"), EXTRA),
    # Parts of a training.
    Signature("the U-Net discriminator of Real-ESRGAN's training", ("conv0.weight", "conv1.weight_orig"), GENERATOR),
    Signature("the discriminator of ESRGAN's training", ("conv0_0.weight", "linear1.weight"), GENERATOR),
    Signature(
        "the classifier VGG",
        ("features.0.weight", "classifier.0.weight"),
        "give it to engine train --vgg, or name a network that enlarges",
    ),
)
"""Networks by their tensors. Some hold all tensors that ``ARCHITECTURES`` looks for, so this table is asked first."""


def recognise(tensors: Container[str]) -> Signature | None:
    """The first line of the table whose tensors are all among these names."""
    return next((line for line in SIGNATURES if all(name in tensors for name in line.tensors)), None)
