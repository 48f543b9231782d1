"""One scene learned by heart: shows that network, losses, decoding and evaluation fit together.

    python scripts/simulate.py --out out/town_one --scenes 1 --seed 3 --split town_one
    python scripts/train.py configs/synthetic/overfit.py --work-dir out/overfit

Cost: not measured. Result: not measured (tests/test_engine.py asks for NDS and lane mAP above 0.8, `pytest -m slow`).
"""

_base_ = ["../_base_/schedule.py"]

model = dict(preset="nano")
train_data = dict(
    dataroot="out/town_one",
    version="v1.0-synthetic",
    split="town_one",
    clip_length=2,
    make_with="python scripts/simulate.py --out out/town_one --scenes 1 --seed 3 --split town_one",
)
val_data = dict(dataroot="out/town_one", version="v1.0-synthetic", split="town_one")
train = dict(epochs=200, batch_size=2, lr=1e-3, warmup_iters=50, val_every=50, ema_momentum=0.0)
