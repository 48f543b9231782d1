"""The published BEVFormer-tiny on nuScenes, with the published weights.

    python scripts/import_checkpoint.py bevformer_tiny_epoch_24.pth --out out/bevformer_tiny.safetensors
    python scripts/evaluate.py configs/nuscenes/bevformer_tiny.py out/bevformer_tiny.safetensors --device cuda

Result: not measured.
"""

model = dict(preset="bevformer_tiny")
val_data = dict(dataroot="data/nuscenes", version="v1.0-trainval", split="val")
