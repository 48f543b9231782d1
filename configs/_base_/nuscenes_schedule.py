"""What the trainings on nuScenes share: for eight GPUs with a batch of two each."""

_base_ = ["schedule.py"]

train = dict(
    batch_size=2, lr=4e-4, warmup_iters=1000, grad_clip=35.0, drop_frames=0.1, frozen_stages=0, val_every=6, workers=4,
    log_every=50,
)  # fmt: skip
