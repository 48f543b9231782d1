r"""BEVFormer (boxes) in the comparison of networks: the same image encoder, images, streets and steps for all.

    perception simulate --out out/town_short --scenes 60 --seed 4000 --rare 0.35 --split town_train \
        --image-size 128x224
    perception simulate --out out/town_short_val --scenes 10 --seed 6000 --split town_val --image-size 128x224
    perception train configs/synthetic/compare_bevformer.py --work-dir out/compare_bevformer --amp

Result: docs/benchmarks.md.
"""

_base_ = ["compare_flagship.py"]

model = dict(
    _delete_=True, preset="bevformer_tiny", image_size=(128, 224),
    backbone=dict(name="resnet18", stages=3, stride=8), bev=(64, 64),
    rotate_center=(32, 32), channels=64, feed_forward=128, heads=4, encoder_layers=3, decoder_layers=3, queries=100,
    max_boxes=100,
)  # fmt: skip
