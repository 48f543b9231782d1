r"""A small Sparse4Dv3 that learns one short scene by heart, to try the whole path on a CPU.

    perception simulate --out out/town_one --scenes 1 --seed 36 --keyframes 4 --image-size 128x224 \
        --split town_one
    perception train configs/synthetic/sparse4d.py --work-dir out/sparse4d --amp

The image backbone is that of the shipped weights, frozen. Cost: about 2 minutes on one CPU core. Result:
docs/benchmarks.md.
"""

_base_ = ["overfit.py"]

model = dict(
    _delete_=True, preset="sparse4dv3_temporal_r50_1x8_bs6_256x704", image_size=(128, 224),
    backbone=dict(name="resnet18", stages=3, stride=8), channels=64, groups=4, heads=4, dropout=0.0,
    sampling_dropout=0.0,
    boxes=dict(anchors=150, remembered=90, layers=3, feed_forward=256, encoder=(32, 8, 8, 16), max_boxes=100),
)  # fmt: skip
train = dict(backbone_weights="perception/weights/nano.safetensors", frozen_stages=3)
