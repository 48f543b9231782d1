r"""The published MapTRv2 on nuScenes: with the published weights, or trained anew.

    perception import-checkpoint maptrv2_nusc_r50_24ep.pth --out out/maptrv2.safetensors
    perception evaluate configs/nuscenes/maptrv2.py out/maptrv2.safetensors --device cuda
    torchrun --nproc_per_node 8 -m perception train configs/nuscenes/maptrv2.py --work-dir out/maptrv2 \
        --amp --launcher pytorch

The published code learns depth from the LiDAR; here boxes tell it.
Results: not measured.
"""

_base_ = ["../_base_/nuscenes.py", "../_base_/published_schedule.py"]

model = dict(preset="maptrv2_nusc_r50_24ep")
train = dict(batch_size=4, lr=6e-4)
