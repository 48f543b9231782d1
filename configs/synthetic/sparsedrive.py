r"""A small SparseDrive (first stage) on the synthetic town, to try the whole path on a CPU.

    perception simulate --out out/town_short --scenes 60 --seed 4000 --rare 0.35 --split town_train \
        --image-size 128x224
    perception simulate --out out/town_short_val --scenes 10 --seed 6000 --split town_val --image-size 128x224
    perception train configs/synthetic/sparsedrive.py --work-dir out/sparsedrive --amp

Results: not measured.
"""

_base_ = ["compare_flagship.py"]

model = dict(
    _delete_=True, preset="sparsedrive_small_stage1", image_size=(128, 224),
    backbone=dict(width=16, channels=64), channels=64, groups=4, heads=4,
    boxes=dict(anchors=200, remembered=120, layers=4, feed_forward=256, encoder=(32, 8, 8, 16), max_boxes=100),
    lines=dict(anchors=50, layers=4, feed_forward=256),
)  # fmt: skip
train = dict(backbone_weights="", frozen_stages=-1)
