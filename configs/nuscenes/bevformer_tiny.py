r"""The published BEVFormer-tiny on nuScenes: with the published weights, or trained anew.

    perception import-checkpoint bevformer_tiny_epoch_24.pth --out out/bevformer_tiny.safetensors
    perception evaluate configs/nuscenes/bevformer_tiny.py out/bevformer_tiny.safetensors --device cuda
    torchrun --nproc_per_node 8 -m perception train configs/nuscenes/bevformer_tiny.py --work-dir out/bevformer_tiny \
        --amp --launcher pytorch

Results: not measured.
"""

_base_ = ["../_base_/nuscenes.py", "../_base_/published_schedule.py"]

model = dict(preset="bevformer_tiny")
train = dict(batch_size=1, lr=2e-4)
