r"""ResNet-101 on 512 x 1408 images of nuScenes, 60 epochs.

    perception train configs/nuscenes/r101_1408_60e.py --dry-run --amp
    torchrun --nproc_per_node 8 -m perception train configs/nuscenes/r101_1408_60e.py --work-dir out/r101_1408_60e \
        --amp --launcher pytorch
    perception evaluate configs/nuscenes/r101_1408_60e.py \
        out/r101_1408_60e/r101_1408_60e.safetensors --json out/r101_1408_60e/evaluation.json

The backbone starts from torchvision's ImageNet weights; docs/training.md names the file and the cost of two steps.
Result: not measured.
"""

_base_ = ["../_base_/nuscenes.py", "../_base_/nuscenes_schedule.py"]

model = dict(preset="base", image_size=(512, 1408), backbone="resnet101")
train = dict(epochs=60, backbone_weights="data/weights/resnet101-cd907fc2.pth", batch_size=1)
