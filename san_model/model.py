"""SAN: Second-order Attention Network for single image super-resolution.

Dai, Cai, Zhang, Xia, Zhang: "Second-order Attention Network for Single Image Super-Resolution", CVPR 2019.

    F_0 = head(x)                                         one 3 x 3 convolution
    F   = NL(F_0), R = F                                  region-level non-local attention
    F   = LSRAG_i(F) + gamma R    for i = 1..n_resgroups  share-source skips, one gamma for all
    y   = tail(NL(F) + F_0)                               the same NL once more, then sub-pixel upsampling

State dicts have the keys and shapes of the authors' code (github.com/daitao/SAN), so files go both ways. What that
code never uses (``conv_last`` and ``non_local.soca`` of the whole network, the ``gamma`` of each group) or trains by
accident (the mean shifts) is a buffer here: every parameter has a gradient.
"""

import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isqrt_cov import cov_sqrt
from isqrt_cov.reference import eig_cov_sqrt
from isqrt_cov.transforms import without_autocast

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K
SCALES = (2, 3, 4, 8)
VARIANTS = ("base", "ssc", "foca", "soca")  # NLRG_Base, NLRG_SSC, NLRG_FOCA and NLRG_SOCA of the paper
NORMALIZATIONS = ("newton_schulz", "eig")
MAX_POOLED_SIDE = 1000  # of the centre that the covariance is taken of
Statistics = Callable[[Tensor], Tensor]  # (B, C, H, W) -> (B, C)


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def _as_buffers(module: nn.Module) -> nn.Module:
    """The same module with buffers in place of parameters: in the state dict, but never trained."""
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            delattr(child, name)
            child.register_buffer(name, parameter.detach())
    return module


class MeanShift(nn.Conv2d):
    """x + sign rgb_range RGB_MEAN, as a fixed 1 x 1 convolution. (B, 3, H, W) -> (B, 3, H, W)."""

    def __init__(self, rgb_range: float, sign: int) -> None:
        self.shift = sign * rgb_range  # before Conv2d's constructor, which calls reset_parameters
        super().__init__(3, 3, 1)
        _as_buffers(self)

    def reset_parameters(self) -> None:
        super().reset_parameters()  # for its random numbers: what a seed gives all later layers depends on them
        nn.init.dirac_(self.weight)
        with torch.no_grad():
            assert self.bias is not None
            self.bias.copy_(self.shift * torch.tensor(RGB_MEAN))

    def forward(self, x: Tensor) -> Tensor:
        # In the wider dtype, also under autocast: bfloat16 has steps of 1 from 128 on, which is a grey level.
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        assert self.bias is not None
        with without_autocast(x):
            return F.conv2d(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class ZeroConv(nn.Conv2d):
    """A convolution that starts at zero."""

    def reset_parameters(self) -> None:
        super().reset_parameters()  # for its random numbers, as in MeanShift
        nn.init.zeros_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class ChannelGate(nn.Sequential):
    """Channel statistics (B, C, 1, 1) -> attention weights in (0, 1), (B, C, 1, 1)."""

    def __init__(self, channels: int, reduction: int) -> None:
        squeezed = channels // reduction
        down, up = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        super().__init__(down, nn.ReLU(inplace=True), up, nn.Sigmoid())


class ChannelAttention(nn.Module):
    """x times a weight per channel, which the gate finds from its ``statistics``, (B, C, H, W) -> (B, C)."""

    def __init__(self, channels: int, reduction: int, statistics: Statistics) -> None:
        super().__init__()
        self.conv_du = ChannelGate(channels, reduction)
        self.statistics = statistics

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv_du(self.statistics(x).to(x.dtype)[:, :, None, None])


def first_order(x: Tensor) -> Tensor:
    """FOCA: the mean of each channel, (B, C, H, W) -> (B, C)."""
    return x.mean((2, 3))


def second_order(x: Tensor, root: Callable[[Tensor], Tensor]) -> Tensor:
    """SOCA: the mean of each row of the covariance's square root, (B, C, H, W) -> (B, C)."""
    height, width = x.shape[2:]
    top, left = max(height - MAX_POOLED_SIDE, 0) // 2, max(width - MAX_POOLED_SIDE, 0) // 2
    x = x[:, :, top : top + MAX_POOLED_SIDE, left : left + MAX_POOLED_SIDE]
    with without_autocast(x):
        return root(x)


def exact_root(x: Tensor) -> Tensor:
    """EIG in place of the Newton-Schulz steps: mean of each row, (B, C, H, W) -> (B, C)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # there is no eigen-decomposition in half precision
    return eig_cov_sqrt(x, output="mean")


class ResidualBlock(nn.Module):
    """x + conv(ReLU(conv(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_first = nn.Sequential(
            _conv3x3(channels, channels), nn.ReLU(inplace=True), _conv3x3(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_first(x) + x


class LSRAG(nn.Module):
    """Local-source residual attention group: residual blocks, channel attention (or none), a convolution, a skip."""

    gamma: Tensor  # unused

    def __init__(self, channels: int, n_resblocks: int, attention: nn.Module | None) -> None:
        super().__init__()
        self.rcab = nn.ModuleList(ResidualBlock(channels) for _ in range(n_resblocks))
        if attention is not None:
            self.soca = attention
        self.conv_last = _conv3x3(channels, channels)
        self.register_buffer("gamma", torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for block in self.rcab:
            out = block(out)
        if hasattr(self, "soca"):
            out = self.soca(out)
        return self.conv_last(out) + x


class NonLocalBlock(nn.Module):
    """x + W softmax(theta' phi) g within each quadrant of the map: embedded Gaussian, keys and values pooled 2 x 2.

    The 1 x 1 convolutions see the whole map at once; only pooling and attention keep to the quadrants.
    """

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        # One-element Sequentials: the published keys are g.0 and phi.0.
        self.g = nn.Sequential(nn.Conv2d(channels, inner, 1))
        self.W = ZeroConv(inner, channels, 1)
        self.theta = nn.Conv2d(channels, inner, 1)
        self.phi = nn.Sequential(nn.Conv2d(channels, inner, 1))

    def forward(self, x: Tensor) -> Tensor:
        bands = self._halves(2, self.theta(x), self.phi(x), self.g(x))
        # Neither comprehension closes over a size: torch.compile may take it for a constant, and compile for each anew.
        attended = [[self._attend(*quadrant) for quadrant in self._halves(3, *band)] for band in bands]
        return x + self.W(torch.cat([torch.cat(parts, 3) for parts in attended], 2))

    @staticmethod
    def _halves(dim: int, theta: Tensor, phi: Tensor, g: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The maps' halves along a dimension, the longer ones last; a side of 1 stays whole."""
        side = theta.shape[dim]
        sizes = [side // 2, side - side // 2] if side > 1 else [1]
        return zip(theta.split(sizes, dim), phi.split(sizes, dim), g.split(sizes, dim), strict=True)

    @staticmethod
    def _attend(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        """softmax(theta' phi) g, unscaled, with phi and g max-pooled: three (B, D, H, W) -> (B, D, H, W)."""
        _, inner, *size = theta.shape
        window = [min(side, 2) for side in size]  # a side of 1 has nothing to pool
        phi, g = F.max_pool2d(phi, window), F.max_pool2d(g, window)
        # Fused attention, which never holds the H W x H W / 4 scores, wants the last dimension contiguous, and on CUDA
        # a multiple of 8; zeros change no inner product.
        query, key, value = (
            F.pad(t.permute(0, 2, 3, 1).flatten(1, 2), (0, -inner % 8))[:, None].contiguous() for t in (theta, phi, g)
        )
        out = F.scaled_dot_product_attention(query, key, value, scale=1.0)[:, 0, :, :inner]
        return out.unflatten(1, size).permute(0, 3, 1, 2)


class RegionNonLocal(nn.Module):
    """RL-NL: one non-local block shared by the four quadrants."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.soca = _as_buffers(nn.ModuleDict({"conv_du": ChannelGate(channels, 8)}))  # unused
        self.non_local = NonLocalBlock(channels, channels // 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.non_local(x)


def _upsampler(scale: int, channels: int) -> nn.Sequential:
    """Sub-pixel convolutions: one step of 3, or log2(scale) steps of 2. (B, C, H, W) -> (B, C, scale H, scale W)."""
    step = 3 if scale == 3 else 2
    layers: list[nn.Module] = []
    for _ in range(round(math.log(scale, step))):
        layers += [_conv3x3(channels, step**2 * channels), nn.PixelShuffle(step)]
    return nn.Sequential(*layers)


class SAN(nn.Module):
    """The whole network: (B, 3, H, W) -> (B, 3, scale H, scale W), any H, W >= 1, in units of ``rgb_range``.

    Args:
        scale: 2, 3, 4 or 8.
        n_resgroups: number of groups.
        n_resblocks: number of residual blocks in a group.
        n_feats: channels, a multiple of 8.
        reduction: what the channel attention divides the channels by.
        rgb_range: value of white.
        variant: "base" has one skip at the tail of each group, "ssc" adds the share-source skips, "foca" adds to those
            first-order channel attention (global average pooling), "soca" second-order attention (covariance pooling).
        iterations: Newton-Schulz steps of the covariance's root, from 1 to 1000.
        normalization: "newton_schulz", or "eig" for the exact root by eigen-decomposition.

    ``config`` holds these arguments by name. Parameters may have a narrower dtype than the buffers, as under
    ``fully_shard`` with mixed precision; ``cast_forward_inputs=False`` of its policy then leaves images unrounded until
    the mean is subtracted.
    """

    def __init__(
        self,
        scale: int = 2,
        n_resgroups: int = 20,
        n_resblocks: int = 10,
        n_feats: int = 64,
        reduction: int = 16,
        rgb_range: float = 255,
        variant: str = "soca",
        iterations: int = 5,
        normalization: str = "newton_schulz",
    ) -> None:
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        _check(config)
        super().__init__()
        self.config: dict[str, Any] = config
        root = exact_root if normalization == "eig" else partial(cov_sqrt, iterations=iterations, output="mean")
        kinds: dict[str, Statistics] = {"foca": first_order, "soca": partial(second_order, root=root)}
        statistics = kinds.get(variant)

        def group() -> LSRAG:
            attention = ChannelAttention(n_feats, reduction, statistics) if statistics else None
            return LSRAG(n_feats, n_resblocks, attention)

        # In the order of the published keys.
        self.gamma = None if variant == "base" else nn.Parameter(torch.empty(1))
        self.sub_mean = MeanShift(rgb_range, -1)
        self.RG = nn.ModuleList(group() for _ in range(n_resgroups))
        self.conv_last = _as_buffers(_conv3x3(n_feats, n_feats))  # unused
        self.add_mean = MeanShift(rgb_range, 1)
        self.non_local = RegionNonLocal(n_feats)
        self.head = nn.Sequential(_conv3x3(3, n_feats))
        self.tail = nn.Sequential(_upsampler(scale, n_feats), _conv3x3(n_feats, 3))
        self.register_state_dict_post_hook(_keep_config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets gamma to zero; like every module here, resets what it holds itself and leaves its children alone."""
        if self.gamma is not None:
            nn.init.zeros_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != 3 or 0 in x.shape[2:] or not x.is_floating_point():
            raise ValueError(f"x: expected floating-point images (B, 3, H, W), got {x.dtype} {tuple(x.shape)}")
        head = self.head(self.sub_mean(x).to(self.head[0].weight.dtype))
        features = source = self.non_local(head)
        for group in self.RG:
            features = group(features) if self.gamma is None else group(features) + self.gamma * source
        return self.add_mean(self.tail(self.non_local(features) + head))

    @staticmethod
    def from_checkpoint(path: str | os.PathLike[str], **overrides: Any) -> "SAN":
        """The network of a .pt, .pth or .safetensors file, the authors' or one of :meth:`save`, on the CPU.

        Sizes and scale come from the tensors, the rest from the configuration that :meth:`save` and ``torch.save`` of a
        state dict keep in the file, or else from the defaults. No code that a file may hold is run. ``overrides`` are
        arguments of the constructor that win over both; with another ``scale`` the upsampler starts anew, to be
        fine-tuned.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no checkpoint of this network, or its configuration is another than its tensors';
                missing, unexpected and misshapen keys are listed.
        """
        from . import checkpoint  # which imports this module

        return checkpoint.load(path, overrides)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state dict and the configuration to a .pt, .pth or .safetensors file."""
        from . import checkpoint

        checkpoint.save(self, path)


def _keep_config(model: SAN, _state: dict[str, Tensor], _prefix: str, metadata: dict[str, Any]) -> None:
    """State dict hook: the configuration goes with the metadata of every state dict, into torch.save for one."""
    metadata["config"] = dict(model.config)


def _check(config: dict[str, Any]) -> None:
    """Raises ValueError that names the first argument which cannot be used, and what it was."""
    for name, allowed in {"scale": SCALES, "variant": VARIANTS, "normalization": NORMALIZATIONS}.items():
        if config[name] not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {config[name]!r}")
    for name in ("n_resgroups", "n_resblocks", "n_feats", "reduction", "iterations"):
        if not isinstance(config[name], int) or isinstance(config[name], bool) or config[name] < 1:
            raise ValueError(f"{name}: expected an integer of 1 or more, got {config[name]!r}")
    if config["iterations"] > 1000:
        raise ValueError(f"iterations: expected 1000 or less, got {config['iterations']}")
    if not isinstance(config["rgb_range"], int | float) or not 0 < config["rgb_range"] < math.inf:
        raise ValueError(f"rgb_range: expected a positive number, got {config['rgb_range']!r}")
    n_feats, reduction = config["n_feats"], config["reduction"]
    if n_feats % 8:
        raise ValueError(f"n_feats: expected a multiple of 8, the non-local block's reduction, got {n_feats}")
    if config["variant"] in ("foca", "soca") and n_feats % reduction:
        raise ValueError(f"reduction: expected a divisor of n_feats = {n_feats}, got {reduction}")
