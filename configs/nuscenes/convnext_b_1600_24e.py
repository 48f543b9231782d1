r"""ConvNeXt-B on 640 x 1600 images of nuScenes, 24 epochs: the size class of V2-99.

    perception train configs/nuscenes/convnext_b_1600_24e.py --dry-run --amp
    torchrun --nproc_per_node 8 -m perception train configs/nuscenes/convnext_b_1600_24e.py --work-dir out/convnext_b \
        --amp --launcher pytorch
    perception evaluate configs/nuscenes/convnext_b_1600_24e.py \
        out/convnext_b/convnext_b_1600_24e.safetensors --json out/convnext_b/evaluation.json

The backbone starts from torchvision's ImageNet weights; docs/training.md names the file and the cost of two steps.
Result: not measured.
"""

_base_ = ["../_base_/nuscenes.py", "../_base_/nuscenes_schedule.py"]

model = dict(preset="base", image_size=(640, 1600), backbone="convnext_base")
train = dict(epochs=24, backbone_weights="data/weights/convnext_base-6075fbad.pth", batch_size=1)
