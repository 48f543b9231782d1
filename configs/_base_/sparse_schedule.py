"""Schedule of Sparse4Dv3 and SparseDrive on nuScenes: 100 epochs on eight GPUs.

Differences from the published schedules: no GridMask, images are not rotated or mirrored, and every scene is streamed
whole, not in two halves.
"""

_base_ = ["schedule.py"]

train = dict(
    epochs=100, streams=8, frames_per_clip=1, warmup_iters=500, weight_decay=0.001, grad_clip=25.0, ema_momentum=0.0,
    backbone_lr_mult=0.5, frozen_stages=-1, val_every=20, workers=4, log_every=50,
    backbone_weights="data/weights/resnet50-11ad3fa6.pth",
)  # fmt: skip
