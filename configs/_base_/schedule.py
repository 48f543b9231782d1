"""What the trainings share. Every config sets epochs, batch_size and lr on top."""

train = dict(
    streams=8,
    frames_per_clip=2,
    drop_frames=0.0,
    image_epochs=0,
    weight_decay=0.01,
    warmup_iters=200,
    grad_clip=10.0,
    ema_momentum=0.002,
    val_every=2,
    log_every=20,
    workers=2,
)
