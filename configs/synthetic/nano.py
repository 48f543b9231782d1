"""The nano network on the synthetic town; trains on two CPU cores.

    python scripts/simulate.py --out out/town_train --scenes 200 --seed 1000 --split town_train
    python scripts/simulate.py --out out/town_val --scenes 10 --seed 5000 --split town_val
    python scripts/train.py configs/synthetic/nano.py --work-dir out/nano
    python scripts/evaluate.py configs/synthetic/nano.py out/nano/nano.safetensors --json out/nano/evaluation.json

Cost: not measured. Result: not measured.
"""

_base_ = ["../_base_/town.py", "../_base_/schedule.py"]

model = dict(preset="nano")
train = dict(epochs=24, batch_size=4, lr=4e-4)
