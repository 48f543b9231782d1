r"""The published MapTR-tiny with geometry-guided kernel attention on nuScenes: published weights, or trained anew.

    perception import-checkpoint maptr_tiny_r50_24e.pth --out out/maptr_tiny_gkt.safetensors
    perception evaluate configs/nuscenes/maptr_tiny_gkt.py out/maptr_tiny_gkt.safetensors --device cuda
    torchrun --nproc_per_node 8 -m perception train configs/nuscenes/maptr_tiny_gkt.py --work-dir out/maptr_tiny_gkt \
        --amp --launcher pytorch

Results: not measured.
"""

_base_ = ["../_base_/nuscenes.py", "../_base_/published_schedule.py"]

model = dict(preset="maptr_tiny_r50_24e_gkt")
train = dict(batch_size=4, lr=6e-4)
