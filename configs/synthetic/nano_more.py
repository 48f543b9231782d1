r"""The nano network on new towns: the third stage of the shipped weights. `nano.py` goes on.

    perception simulate --out out/town_more --scenes 40 --seed 8000 --split town_train
    perception simulate --out out/town_more_rare --scenes 160 --seed 7000 --rare 0.7 --split town_train
    perception simulate --out out/town_more_5hz --scenes 20 --seed 9000 --rare 0.35 --rate 5 --split town_train
    perception simulate --out out/town_val --scenes 20 --seed 5000 --split town_val
    perception train configs/synthetic/nano_more.py --work-dir out/nano_more --amp
    perception evaluate configs/synthetic/nano_more.py out/nano_more/nano_more.safetensors \
        --json out/nano_more/evaluation.json

Goes on from `nano_large.py`.

Cost: 1 h 57 min for 3,465 steps on two CPU cores, with other work on the machine. Result on town_val: NDS 0.410, mAP
0.344, lane mAP 0.757. In that training each decoder layer predicted velocities from scratch. Now each layer refines
those of the layer before (docs/training.md).
"""

_base_ = ["nano_large.py"]

train_data = dict(
    dataroot=("out/town_more", "out/town_more_rare", "out/town_more_5hz"),
    make_with={
        "out/town_more": "perception simulate --out out/town_more --scenes 40 --seed 8000 --split town_train",
        "out/town_more_rare": "perception simulate --out out/town_more_rare --scenes 160 --seed 7000 --rare 0.7 "
        "--split town_train",
        "out/town_more_5hz": "perception simulate --out out/town_more_5hz --scenes 20 --seed 9000 --rare 0.35 --rate "
        "5 --split town_train",
    },
)
train = dict(init_from="out/nano_large/nano_large.safetensors", epochs=7)
