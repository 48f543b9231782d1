"""Schedule of the published networks on nuScenes: 24 epochs on eight GPUs.

Differences from the published schedules: no dropout, no GridMask, and scenes are streamed with a loss on every frame.
"""

_base_ = ["schedule.py"]

train = dict(
    epochs=24, streams=32, frames_per_clip=1, warmup_iters=500, grad_clip=35.0, ema_momentum=0.0, backbone_lr_mult=0.1,
    frozen_stages=1, val_every=6, workers=4, log_every=50, backbone_weights="data/weights/resnet50-11ad3fa6.pth",
)  # fmt: skip
