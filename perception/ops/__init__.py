"""Sampling of feature maps: bilinear reading of several cameras or of the BEV grid at learned locations."""

from perception.ops.sampling import read_cameras, sample_bev, sample_cameras

__all__ = ["read_cameras", "sample_bev", "sample_cameras"]
