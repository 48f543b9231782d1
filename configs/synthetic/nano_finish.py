"""The last epochs of the nano network: where `nano.py` ends, with calibrations that are right.

    python scripts/train.py configs/synthetic/nano.py --work-dir out/nano --amp
    python scripts/train.py configs/synthetic/nano_finish.py --work-dir out/nano_finish --amp
    python scripts/evaluate.py configs/synthetic/nano_finish.py out/nano_finish/nano_finish.safetensors \
        --json out/nano_finish/evaluation.json
"""

_base_ = ["nano.py"]

train_data = dict(augment=dict(jitter_deg=0.0))
train = dict(init_from="out/nano/nano.safetensors", image_epochs=0, epochs=2, lr=8e-4, warmup_iters=50, val_every=1)
