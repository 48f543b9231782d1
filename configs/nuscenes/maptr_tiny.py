"""The published MapTR-tiny with BEVFormer's encoder on nuScenes, with the published weights.

    python scripts/import_checkpoint.py maptr_tiny_r50_24e_bevformer.pth --out out/maptr_tiny.safetensors
    python scripts/evaluate.py configs/nuscenes/maptr_tiny.py out/maptr_tiny.safetensors --device cuda

Result: not measured.
"""

model = dict(preset="maptr_tiny_r50_24e_bevformer")
val_data = dict(dataroot="data/nuscenes", version="v1.0-trainval", split="val")
