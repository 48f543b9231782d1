r"""The first stage of SparseDrive (ResNet-50, 256 x 704) on nuScenes: with the published weights, or from scratch.

    perception import-checkpoint sparsedrive_stage1.pth --out out/sparsedrive.safetensors
    perception evaluate configs/nuscenes/sparsedrive_stage1.py out/sparsedrive.safetensors --device cuda
    torchrun --nproc_per_node 8 -m perception train configs/nuscenes/sparsedrive_stage1.py --work-dir out/sparsedrive \
        --amp --launcher pytorch

The published code learns depth from LiDAR points, and starts from clusters of the ground truth. Here depth is learned
from boxes, and the anchors start at regular places.
Results: not measured.
"""

_base_ = ["../_base_/nuscenes.py", "../_base_/sparse_schedule.py"]

model = dict(preset="sparsedrive_small_stage1")
train = dict(batch_size=8, lr=4e-4)
