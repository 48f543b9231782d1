"""The published MapTRv2 with lane centre lines on nuScenes, with the published weights.

Centre lines are not evaluated; the other three classes are.

    perception import-checkpoint maptrv2_nusc_r50_24ep_w_centerline.pth --out out/maptrv2_centerline.safetensors
    perception evaluate configs/nuscenes/maptrv2_centerline.py out/maptrv2_centerline.safetensors --device cuda

Result: not measured.
"""

model = dict(preset="maptrv2_nusc_r50_24ep_w_centerline")
val_data = dict(dataroot="data/nuscenes", version="v1.0-trainval", split="val")
