"""SAN, the second-order attention network for single image super-resolution.

>>> import torch
>>> from san_model import SAN
>>> SAN(scale=2, n_resgroups=1, n_resblocks=1, n_feats=16)(torch.rand(1, 3, 8, 8) * 255).shape
torch.Size([1, 3, 16, 16])
"""

from .model import SAN

__all__ = ["SAN"]
