r"""One short scene learned by heart: shows that network, losses, decoding and evaluation fit together.

    perception simulate --out out/town_one --scenes 1 --seed 36 --keyframes 4 --image-size 128x224 \
        --split town_one
    perception train configs/synthetic/overfit.py --work-dir out/overfit --amp

The seed is one whose scene shows all ten classes of boxes and all three of lines; a class that a split lacks counts as
zero in NDS. Cost: about 4 minutes on two CPU cores. Result: tests/test_engine.py asks for NDS and lane mAP above 0.8
(`pytest -m slow`).
"""

_base_ = ["../_base_/schedule.py"]

model = dict(preset="nano", image_size=(128, 224))
train_data = val_data = dict(
    dataroot="out/town_one",
    version="v1.0-synthetic",
    split="town_one",
    make_with={
        "out/town_one": "perception simulate --out out/town_one --scenes 1 --seed 36 --keyframes 4 "
        "--image-size 128x224 --split town_one",
    },
)
train = dict(
    epochs=100,
    batch_size=1,
    streams=1,
    lr=1e-3,
    warmup_iters=20,
    val_every=100,
    ema_momentum=0.0,
    workers=0,
    log_every=15,
)
