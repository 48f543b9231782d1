"""The nano network on the synthetic town; trains on two CPU cores. `nano_finish.py` goes on where this ends.

    python scripts/simulate.py --out out/town_train --scenes 300 --seed 1000 --split town_train --image-size 160x288
    python scripts/simulate.py --out out/town_val --scenes 20 --seed 5000 --split town_val --image-size 160x288
    python scripts/train.py configs/synthetic/nano.py --work-dir out/nano --amp
    python scripts/evaluate.py configs/synthetic/nano.py out/nano/nano.safetensors --json out/nano/evaluation.json

Cost: 3 h 2 min for 9,000 steps on two CPU cores, 1.8 GB of memory and 0.7 GB for the loader. Result on town_val:
NDS 0.243, mAP 0.171, lane mAP 0.560.
"""

_base_ = ["../_base_/town.py", "../_base_/schedule.py"]

model = dict(preset="nano")
train = dict(
    image_epochs=4, epochs=8, batch_size=2, lr=2e-3, warmup_iters=100, ema_momentum=0.0, val_every=2, workers=1
)
