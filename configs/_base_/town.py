"""The synthetic town: one set of scenes to train on, another to validate on, made from different seeds."""

train_data = dict(
    dataroot="out/town_train",
    version="v1.0-synthetic",
    split="town_train",
    # No mirroring: the town drives on the right, and what is seen of a street tells which way cars head.
    augment=dict(mirror=0.0, drop_camera=0.15, jitter_deg=0.5),
    make_with="python scripts/simulate.py --out out/town_train --scenes 300 --seed 1000 --split town_train "
    "--image-size 160x288",
)
val_data = dict(
    dataroot="out/town_val",
    version="v1.0-synthetic",
    split="town_val",
    make_with="python scripts/simulate.py --out out/town_val --scenes 20 --seed 5000 --split town_val "
    "--image-size 160x288",
)
