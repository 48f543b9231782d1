"""Deformable sampling of feature maps: bilinear sampling of cameras or of the BEV grid at learned locations."""

from perception.ops.bilinear import is_channels_last
from perception.ops.sampling import read_cameras, sample_bev, sample_cameras

__all__ = ["is_channels_last", "read_cameras", "sample_bev", "sample_cameras"]
