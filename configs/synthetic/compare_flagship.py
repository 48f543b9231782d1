r"""The flagship in the comparison of networks, and what ablations are made with: a short training on small images.

    perception simulate --out out/town_short --scenes 60 --seed 4000 --rare 0.35 --split town_train \
        --image-size 128x224
    perception simulate --out out/town_short_val --scenes 10 --seed 6000 --split town_val --image-size 128x224
    perception train configs/synthetic/compare_flagship.py --work-dir out/compare_flagship --amp

All networks of the comparison take the image backbone of the shipped weights and hold it: from random weights so short
a training learns next to nothing. That backbone was trained in the flagship, which may favour it.

Result: docs/benchmarks.md and docs/ablations.md.
"""

_base_ = ["../_base_/town.py", "../_base_/schedule.py"]

model = dict(preset="nano", image_size=(128, 224), grid=(64, 64))
train_data = dict(
    dataroot="out/town_short",
    augment=dict(drop_camera=0.15),
    make_with={
        "out/town_short": "perception simulate --out out/town_short --scenes 60 --seed 4000 --rare 0.35 "
        "--split town_train --image-size 128x224",
    },
)
val_data = dict(
    dataroot="out/town_short_val",
    make_with={
        "out/town_short_val": "perception simulate --out out/town_short_val --scenes 10 --seed 6000 --split town_val "
        "--image-size 128x224",
    },
)
train = dict(
    backbone_weights="perception/weights/nano.safetensors", frozen_stages=3, epochs=4, batch_size=2, lr=2e-3,
    warmup_iters=50, ema_momentum=0.01, val_every=10, workers=1,
)  # fmt: skip
