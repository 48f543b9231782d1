r"""The published MapQR on nuScenes: with the published weights, or trained from scratch.

    perception import-checkpoint mapqr_nusc_r50_24ep.pth --out out/mapqr.safetensors
    perception evaluate configs/nuscenes/mapqr.py out/mapqr.safetensors --device cuda
    torchrun --nproc_per_node 8 -m perception train configs/nuscenes/mapqr.py --work-dir out/mapqr \
        --amp --launcher pytorch

Results: not measured.
"""

_base_ = ["../_base_/nuscenes.py", "../_base_/published_schedule.py"]

model = dict(preset="mapqr_nusc_r50_24ep")
train = dict(batch_size=4, lr=6e-4)
