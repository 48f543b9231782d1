r"""The published MapTR-tiny with BEVFormer's encoder on nuScenes: with the published weights, or trained anew.

    perception import-checkpoint maptr_tiny_r50_24e_bevformer.pth --out out/maptr_tiny.safetensors
    perception evaluate configs/nuscenes/maptr_tiny.py out/maptr_tiny.safetensors --device cuda
    torchrun --nproc_per_node 8 -m perception train configs/nuscenes/maptr_tiny.py --work-dir out/maptr_tiny \
        --amp --launcher pytorch

Results: not measured.
"""

_base_ = ["../_base_/nuscenes.py", "../_base_/published_schedule.py"]

model = dict(preset="maptr_tiny_r50_24e_bevformer")
train = dict(batch_size=4, lr=6e-4)
