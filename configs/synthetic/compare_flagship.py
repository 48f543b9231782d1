r"""The flagship in the comparison of networks: the same image encoder, images, streets and steps for all.

    python scripts/simulate.py --out out/town_short --scenes 60 --seed 4000 --rare 0.35 --split town_train \
        --image-size 128x224
    python scripts/simulate.py --out out/town_short_val --scenes 10 --seed 6000 --split town_val --image-size 128x224
    python scripts/train.py configs/synthetic/compare_flagship.py --work-dir out/compare_flagship --amp

docs/benchmarks.md compares them. Cost: not measured. Result: not measured.
"""

_base_ = ["ablation.py"]

model = dict(
    _delete_=True, preset="nano", image_size=(128, 224), grid=(64, 64),
)  # fmt: skip
train = dict(image_epochs=0, epochs=6)
