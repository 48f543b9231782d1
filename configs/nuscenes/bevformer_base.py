"""The published BEVFormer-base on nuScenes, with the published weights.

    perception import-checkpoint bevformer_r101_dcn_24ep.pth --out out/bevformer_base.safetensors
    perception evaluate configs/nuscenes/bevformer_base.py out/bevformer_base.safetensors --device cuda

Result: not measured.
"""

model = dict(preset="bevformer_base")
val_data = dict(dataroot="data/nuscenes", version="v1.0-trainval", split="val")
