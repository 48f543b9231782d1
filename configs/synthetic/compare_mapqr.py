r"""MapQR (lines) in the comparison of networks: the same image encoder, images, scenes and steps for all.

    perception simulate --out out/town_short --scenes 60 --seed 4000 --rare 0.35 --split town_train \
        --image-size 128x224
    perception simulate --out out/town_short_val --scenes 10 --seed 6000 --split town_val --image-size 128x224
    perception train configs/synthetic/compare_mapqr.py --work-dir out/compare_mapqr --amp

Result: not measured.
"""

_base_ = ["compare_flagship.py"]

model = dict(
    _delete_=True, preset="mapqr_nusc_r50_24ep", image_size=(128, 224),
    backbone=dict(name="resnet18", stages=3, stride=8),
    bev=(80, 40), channels=64, feed_forward=128, heads=4, encoder_layers=1, decoder_layers=3, pillar_points=4,
    lines=40, max_lines=40, one_to_many_queries=120, one_to_many_repeats=3,
)  # fmt: skip
