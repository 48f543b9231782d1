"""The synthetic town: training scenes with usual class frequencies, with more rare classes and at 5 Hz, and validation
scenes, all from different seeds."""

train_data = dict(
    dataroot=("out/town_train", "out/town_train_rare", "out/town_train_5hz"),
    version="v1.0-synthetic",
    split="town_train",
    # No mirroring: the town drives on the right, so the side of the road shows the heading of cars.
    augment=dict(mirror=0.0, drop_camera=0.3, extrinsics_noise=0.3),
    make_with={
        "out/town_train": "perception simulate --out out/town_train --scenes 60 --seed 1000 --split town_train",
        "out/town_train_rare": "perception simulate --out out/town_train_rare --scenes 160 --seed 3000 --rare 0.7 "
        "--split town_train",
        "out/town_train_5hz": "perception simulate --out out/town_train_5hz --scenes 30 --seed 2000 --rare 0.35 "
        "--rate 5 --split town_train",
    },
)
val_data = dict(
    dataroot="out/town_val",
    version="v1.0-synthetic",
    split="town_val",
    make_with={
        "out/town_val": "perception simulate --out out/town_val --scenes 20 --seed 5000 --split town_val",
    },
)
