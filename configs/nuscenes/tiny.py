r"""The tiny network on nuScenes.

    torchrun --nproc_per_node 8 -m perception train configs/nuscenes/tiny.py --work-dir out/tiny --amp \
        --launcher pytorch
    perception evaluate configs/nuscenes/tiny.py out/tiny/tiny.safetensors --json out/tiny/evaluation.json

Cost: docs/training.md. Result: not measured.
"""

_base_ = ["../_base_/nuscenes.py", "../_base_/schedule.py"]

model = dict(preset="tiny")
train = dict(epochs=24, batch_size=2, lr=2e-4, warmup_iters=1000, workers=4, log_every=50)
