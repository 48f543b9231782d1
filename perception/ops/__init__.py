"""Deformable sampling of feature maps: bilinear sampling of cameras or of the BEV grid at learned locations."""

from perception.ops.sampling import read_cameras, sample_bev, sample_cameras

__all__ = ["read_cameras", "sample_bev", "sample_cameras"]
