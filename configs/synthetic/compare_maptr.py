r"""MapTR (lines) in the comparison of networks: the same image encoder, images, streets and steps for all.

    perception simulate --out out/town_short --scenes 60 --seed 4000 --rare 0.35 --split town_train \
        --image-size 128x224
    perception simulate --out out/town_short_val --scenes 10 --seed 6000 --split town_val --image-size 128x224
    perception train configs/synthetic/compare_maptr.py --work-dir out/compare_maptr --amp

Result: docs/benchmarks.md.
"""

_base_ = ["compare_flagship.py"]

model = dict(
    _delete_=True, preset="maptr_tiny_r50_24e_bevformer", image_size=(128, 224),
    backbone=dict(name="resnet18", stages=3, stride=8),
    bev=(136, 68), channels=64, feed_forward=128, heads=4, encoder_layers=1, decoder_layers=3, lines=40, max_lines=40,
)  # fmt: skip
