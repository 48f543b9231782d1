r"""The nano network on all the streets of the stage before and as many new ones: the last stage of the shipped weights.

    python scripts/simulate.py --out out/town_last --scenes 60 --seed 11000 --split town_train
    python scripts/simulate.py --out out/town_last_rare --scenes 100 --seed 10000 --rare 0.7 --split town_train
    python scripts/simulate.py --out out/town_val --scenes 20 --seed 5000 --split town_val
    python scripts/train.py configs/synthetic/nano.py --work-dir out/nano --amp
    python scripts/evaluate.py configs/synthetic/nano.py out/nano/nano.safetensors --json out/nano/evaluation.json

Goes on from `nano_more.py`, for a GPU: eight times the batch, the whole trunk learns.
"""

_base_ = ["nano_more.py"]

train_data = dict(
    dataroot=("out/town_more", "out/town_more_rare", "out/town_more_5hz", "out/town_last", "out/town_last_rare"),
    make_with="python scripts/simulate.py --out out/town_last --scenes 60 --seed 11000 --split town_train && "
    "python scripts/simulate.py --out out/town_last_rare --scenes 100 --seed 10000 --rare 0.7 --split town_train",
)
train = dict(
    init_from="out/nano_more/nano_more.safetensors", frozen_stages=-1, epochs=30, batch_size=16, groups=4, lr=2e-3,
    warmup_iters=100, ema_momentum=0.002, workers=13,
)  # fmt: skip
