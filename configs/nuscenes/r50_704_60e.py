r"""ResNet-50 on 256 x 704 images of nuScenes, 60 epochs.

    perception train configs/nuscenes/r50_704_60e.py --dry-run --amp
    torchrun --nproc_per_node 8 -m perception train configs/nuscenes/r50_704_60e.py --work-dir out/r50_704_60e \
        --amp --launcher pytorch
    perception evaluate configs/nuscenes/r50_704_60e.py \
        out/r50_704_60e/r50_704_60e.safetensors --json out/r50_704_60e/evaluation.json

The backbone starts from torchvision's ImageNet weights; docs/training.md names the file and the cost of two steps.
Result: not measured.
"""

_base_ = ["../_base_/nuscenes.py", "../_base_/nuscenes_schedule.py"]

model = dict(preset="base")
train = dict(epochs=60, backbone_weights="data/weights/resnet50-11ad3fa6.pth")
