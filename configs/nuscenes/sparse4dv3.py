r"""The published Sparse4Dv3 (ResNet-50, 256 x 704) on nuScenes: with the published weights, or trained from scratch.

    perception import-checkpoint sparse4dv3_r50.pth --out out/sparse4dv3.safetensors
    perception evaluate configs/nuscenes/sparse4dv3.py out/sparse4dv3.safetensors --device cuda
    torchrun --nproc_per_node 8 -m perception train configs/nuscenes/sparse4dv3.py --work-dir out/sparse4dv3 \
        --amp --launcher pytorch

The published code learns depth from LiDAR points, and starts from clusters of the ground truth. Here depth is learned
from boxes, and the anchors start on a spiral.
Results: not measured.
"""

_base_ = ["../_base_/nuscenes.py", "../_base_/sparse_schedule.py"]

model = dict(preset="sparse4dv3_temporal_r50_1x8_bs6_256x704")
train = dict(batch_size=6, lr=6e-4)
