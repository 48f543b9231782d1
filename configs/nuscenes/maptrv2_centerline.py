"""The published MapTRv2 that finds centre lines too, on nuScenes with the published weights; other lines are judged.

    perception import-checkpoint maptrv2_nusc_r50_24ep_w_centerline.pth --out out/maptrv2_centerline.safetensors
    perception evaluate configs/nuscenes/maptrv2_centerline.py out/maptrv2_centerline.safetensors --device cuda

Result: not measured.
"""

model = dict(preset="maptrv2_nusc_r50_24ep_w_centerline")
val_data = dict(dataroot="data/nuscenes", version="v1.0-trainval", split="val")
