"""Community networks as spandrel builds them: small state dicts of every form, and their output by spandrel."""

import torch

from engine.archs.foreign import load_spandrel
from engine.archs.layers import RGB, image_of

spandrel = load_spandrel()

from spandrel.architectures import RealCUGAN  # noqa: E402
from spandrel.architectures.Compact import Compact  # noqa: E402 (torchvision must be made to fit first)
from spandrel.architectures.DnCNN import DnCNN  # noqa: E402
from spandrel.architectures.DRUNet import DRUNet  # noqa: E402
from spandrel.architectures.ESRGAN import ESRGAN  # noqa: E402
from spandrel.architectures.MixDehazeNet import MixDehazeNet  # noqa: E402
from spandrel.architectures.MoESR import MoESR  # noqa: E402
from spandrel.architectures.MoSR import MoSR  # noqa: E402
from spandrel.architectures.OmniSR import OmniSR  # noqa: E402
from spandrel.architectures.PLKSR import PLKSR, RealPLKSR  # noqa: E402
from spandrel.architectures.RCAN import RCAN  # noqa: E402
from spandrel.architectures.SAFMN import SAFMN  # noqa: E402
from spandrel.architectures.SPAN import SPAN  # noqa: E402
from spandrel.architectures.SwiftSRGAN import SwiftSRGAN  # noqa: E402
from spandrel.architectures.SwinIR import SwinIR  # noqa: E402


def esrgan(upsamplings=2, fold=1, channels=3, **options):
    """ESRGAN under the names of its first release."""
    size = {"in_nc": channels * fold**2, "out_nc": channels, "scale": 2**upsamplings, "num_filters": 8, "num_blocks": 1}
    return ESRGAN(**size, shuffle_factor=fold if fold > 1 else None, **options)


def compact(scale=4, channels=3, convs=1):
    return Compact(num_in_ch=channels, num_out_ch=channels, num_feat=8, num_conv=convs, upscale=scale)


def span(scale=4, channels=3, norm=True):
    return SPAN(num_in_ch=channels, num_out_ch=channels, feature_channels=8, upscale=scale, norm=norm)


def swinir(head="nearest+conv", scale=4, channels=3, window=4, **options):
    """``head`` is empty for none."""
    size = {"img_size": 4 * window, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "mlp_ratio": 1.5}
    image_range = 255.0 if window == 7 else 1.0
    return SwinIR(
        **size, window_size=window, upsampler=head, upscale=scale, in_chans=channels, img_range=image_range, **options
    )


def mosr():
    return MoSR(dim=8, n_block=2, upscale=2, upsampler="ps")


def drunet():
    """Takes a level of noise beside the picture."""
    return DRUNet(in_nc=4, out_nc=3, nc=[8, 8, 8, 8], nb=2)


def dncnn():
    """Batch norms; yields noise, which is subtracted."""
    return DnCNN(in_nc=3, out_nc=3, nc=8)


def plksr():
    """Large kernels write to some channels of their input."""
    return PLKSR(dim=8, n_blocks=2, upscaling_factor=2, kernel_size=7)


def swiftsrgan():
    return SwiftSRGAN(num_channels=8, num_blocks=2, upscale_factor=2)


def moesr():
    """Kernels of one row, and blocks of half the size."""
    return MoESR(dim=8, n_blocks=1, n_block=1, scale=2, upsample_dim=8)


def safmn():
    """The largest of 2, 4 and 8 pixels, repeated as often."""
    return SAFMN(dim=8, n_blocks=2, upscaling_factor=2)


def mixdehazenet():
    """Yields the range -1 to 1."""
    return MixDehazeNet(embed_dims=[8, 16, 32, 16, 8])


def rcan():
    """Averages over the whole picture, one after another."""
    return RCAN(scale=2, n_resgroups=1, n_resblocks=2, n_feats=8, reduction=2)


def realplksr(**options):
    """GroupNorm over the whole picture, or layer norms of channels."""
    return RealPLKSR(dim=8, n_blocks=2, upscaling_factor=2, kernel_size=5, norm_groups=2, **options)


@torch.no_grad()
def cugan(name, pro):
    """Real-CUGAN, which has one size."""
    return getattr(RealCUGAN, name)(pro=pro).requires_grad_(False)


def omnisr():
    """Attention between pixels an eighth of the picture apart."""
    return OmniSR(num_feat=8, res_num=1, up_scale=2)


@torch.no_grad()
def state_of(network):
    """Tensors as a trainer saves them, with weights under which every layer changes every pixel."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    if getattr(network, "start_unshuffle", 1) > 1:
        for kind in ("weight", "bias"):  # behind the layer that folds pixels
            state[f"conv_first.1.{kind}"] = state.pop(f"conv_first.{kind}")
    return state


@torch.inference_mode()
def output_of(state, picture):
    """Output [3, H, W] for a picture [3, h, w], and the scale: of networks with one channel grey, with four opaque."""
    loaded = spandrel.ModelLoader().load_from_state_dict(dict(state)).eval()
    output = loaded._call_fn(loaded.model, image_of(picture[None], channels=loaded.input_channels))[0]
    return output.expand(RGB, -1, -1)[:RGB] if len(output) == 1 else output[:RGB], loaded.scale
