"""The published BEVFormer-small on nuScenes, with the published weights.

    perception import-checkpoint bevformer_small_epoch_24.pth --out out/bevformer_small.safetensors
    perception evaluate configs/nuscenes/bevformer_small.py out/bevformer_small.safetensors --device cuda

Result: not measured.
"""

model = dict(preset="bevformer_small")
val_data = dict(dataroot="data/nuscenes", version="v1.0-trainval", split="val")
