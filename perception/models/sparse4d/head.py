"""The decoder of Sparse4Dv3, which SparseDrive uses for boxes and for lines.

Instances (a feature vector and an anchor) attend to the memory and to each other, sample image features at their key
points, and refine their anchors, layer by layer. After the first layers, the instances of the memory replace the weaker
ones. Modules are named as in the published checkpoints: `layers` holds the operations of all decoder layers in a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perception.models.sparse4d.aggregation import CameraView, DeformableAggregation, KeyPoints
from perception.models.sparse4d.blocks import Attention, FeedForward
from perception.models.sparse4d.boxes import BoxEncoder, BoxKeyPoints, BoxRefinement, initial_boxes, move_boxes
from perception.models.sparse4d.config import HeadConfig, LineHeadConfig, Sparse4DConfig
from perception.models.sparse4d.denoising import Denoised, HandedOn, Noisy, hand_on, no_groups, take_handed_on
from perception.models.sparse4d.lines import LineEncoder, LineKeyPoints, LineRefinement, initial_lines, move_lines
from perception.models.sparse4d.memory import InstanceBank, InstanceMemory, Motion


class Instances(NamedTuple):
    """Predictions of one head, of all decoder layers."""

    logits: Tensor  # [S, B, Q, K] of the layers that predict scores, see `HeadConfig.scores_all_layers`
    quality: Tensor  # [S, B, Q, 2] logits of centerness and yawness; [S, B, Q, 0] for lines
    anchors: Tensor  # [L, B, Q, D]
    ids: Tensor  # [B, Q] int32


class HeadOutput(NamedTuple):
    """What a head returns."""

    instances: Instances
    feature: Tensor  # [B, Q, C] of the instances after the last layer
    memory: InstanceMemory  # for the next frame
    denoised: Denoised | None  # in training with noisy instances
    handed_on: HandedOn  # noisy instances for the next frame


def operations(config: HeadConfig) -> list[str]:
    """Lists the operations of all decoder layers in their published order."""
    layer = ["attend", "norm", "sample", "feed_forward", "norm", "refine"]
    order = layer * config.single_frame_layers + ["recall", *layer] * (config.layers - config.single_frame_layers)
    return order if config.first_attention else order[2:]


class SparseHead(nn.Module):
    """Decodes instances of one kind.

    Args:
        config: of the network.
        head: of the head.
        encoder: encodes anchors.
        key_points: makes a module for key points.
        refinement: makes a module that refines anchors.
        bank: the initial instances.
    """

    def __init__(
        self,
        config: Sparse4DConfig,
        head: HeadConfig,
        encoder: nn.Module,
        key_points: Callable[[], KeyPoints],
        refinement: Callable[[], nn.Module],
        bank: InstanceBank,
    ) -> None:
        super().__init__()
        C = config.channels
        self.config = head
        self.instance_bank = bank
        self.anchor_encoder = encoder
        width = 2 * C if head.decoupled else C
        make = {
            "attend": lambda: Attention(width, config.heads, config.dropout),
            "recall": lambda: Attention(width, config.heads, config.dropout),
            "norm": lambda: nn.LayerNorm(C),
            "sample": lambda: DeformableAggregation(config, key_points()),
            "feed_forward": lambda: FeedForward(2 * C, head.feed_forward, C, config.dropout),
            "refine": refinement,
        }
        self.operations = operations(head)
        self.layers = nn.ModuleList([make[name]() for name in self.operations])
        # Attention sees features and encodings concatenated, so its values are widened and its results narrowed.
        self.fc_before = nn.Linear(C, width, bias=False) if head.decoupled else nn.Identity()
        self.fc_after = nn.Linear(width, C, bias=False) if head.decoupled else nn.Identity()
        self._initialise()

    def _initialise(self) -> None:
        """Sets initial weights as the published code does."""
        layer: Any
        for name, layer in zip(self.operations, self.layers, strict=True):
            if name == "refine":
                nn.init.constant_(layer.cls_layers[-1].bias, -math.log(99))  # an initial score of 0.01
                continue
            for key, parameter in layer.named_parameters():
                if parameter.dim() > 1 and "fix_scale" not in key:
                    nn.init.xavier_uniform_(parameter)
            if name == "sample":
                for parameter in (*layer.weights_fc.parameters(), layer.output_proj.bias):
                    nn.init.zeros_(parameter)
                nn.init.zeros_(layer.kps_generator.learnable_fc.bias)

    def forward(
        self,
        view: CameraView,
        memory: InstanceMemory,
        motion: Motion,
        noisy: Noisy | None = None,
        handed_on: HandedOn | None = None,
    ) -> HeadOutput:
        """Predicts the instances of one frame.

        Args:
            view: image features.
            memory: of the previous frame.
            motion: since the previous frame.
            noisy: instances around the ground truth, for training.
            handed_on: those of the previous frame.
        """
        config, bank, B = self.config, self.instance_bank, len(motion.seconds)
        recalled = bank.recall(memory, motion)
        feature, anchor = (x.expand(B, -1, -1) for x in (bank.instance_feature, bank.anchor.float()))
        Q, mask = feature.shape[1], None
        if noisy is not None:
            anchor = torch.cat([anchor, noisy.anchor], 1)
            feature = torch.cat([feature, feature.new_zeros(B, noisy.anchor.shape[1], feature.shape[2])], 1)
            mask = noisy.mask_with(Q)
            handed_on = no_groups(feature, anchor) if handed_on is None else handed_on
            moved = bank.move(handed_on.anchor.flatten(1, 2), *motion[:2])
            handed_on = handed_on._replace(anchor=moved.view_as(handed_on.anchor))
        encoding = self.anchor_encoder(anchor)
        remembered = self.anchor_encoder(recalled.memory.anchor)
        scored: list[tuple[Tensor, Tensor]] = []
        anchors: list[Tensor] = []
        targets = [] if noisy is None else [noisy]  # of the noisy instances, by decoder layer
        layer: Any
        for name, layer in zip(self.operations, self.layers, strict=True):
            if name == "recall":
                memory_feature = recalled.memory.feature
                feature = self._recall(layer, feature, encoding, memory_feature, remembered, recalled.exists, mask)
            elif name == "attend":
                feature = self._attend(layer, feature, encoding, mask)
            elif name == "sample":
                feature = layer(feature, anchor, encoding, view)
            elif name != "refine":
                feature = layer(feature)
            else:
                anchor = layer(feature, anchor, encoding, recalled.interval)
                anchors.append(anchor)
                done = len(anchors)
                if self.training or config.scores_all_layers or done in (config.single_frame_layers, config.layers):
                    scored.append(layer.scores(feature, encoding))
                if done == config.single_frame_layers:
                    new_feature, new_anchor = bank.take_over(
                        feature[:, :Q], anchor[:, :Q], scored[-1][0][:, :Q], recalled
                    )
                    rest_feature, rest_anchor = feature[:, Q:], anchor[:, Q:]
                    if noisy is not None and handed_on is not None:
                        rest_feature, rest_anchor, target = take_handed_on(
                            rest_feature, rest_anchor, noisy, handed_on, recalled.fresh
                        )
                        targets.append(target)
                    feature = torch.cat([new_feature, rest_feature], 1)
                    anchor = torch.cat([new_anchor, rest_anchor], 1)
                if done < config.layers:
                    encoding = self.anchor_encoder(anchor)
                if done > config.single_frame_layers:
                    # As published, the keys of the memory's features are now the encodings of the present instances.
                    remembered = encoding[:, : config.remembered]
        logits, quality = (torch.stack(x) for x in zip(*scored, strict=True))
        stacked = torch.stack(anchors)
        ids, memory = bank.remember(feature[:, :Q], anchor[:, :Q], logits[-1, :, :Q], recalled)
        denoised, next_handed_on = None, no_groups(feature, anchor)
        if noisy is not None:
            denoised = Denoised(logits[:, :, Q:], stacked[:, :, Q:], targets[0].target, targets[-1].target)
            next_handed_on = hand_on(feature[:, Q:], anchor[:, Q:], targets[-1])
        instances = Instances(logits[:, :, :Q], quality[:, :, :Q], stacked[:, :, :Q], ids)
        return HeadOutput(instances, feature[:, :Q], memory, denoised, next_handed_on)

    def _attend(self, layer: nn.Module, feature: Tensor, encoding: Tensor, mask: Tensor | None) -> Tensor:
        """Self-attention among instances [B, Q, C]."""
        query = self._with_encoding(feature, encoding)
        residual = query if self.config.decoupled else feature
        return self.fc_after(layer(query, query, self.fc_before(feature), mask, residual))

    def _recall(
        self,
        layer: nn.Module,
        feature: Tensor,
        encoding: Tensor,
        remembered: Tensor,
        remembered_encoding: Tensor,
        exists: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Attention of instances [B, Q, C] to the T remembered ones.

        As published, instances without a memory attend to each other instead, and the values are then not widened by
        `fc_before` but are features and encodings. Both cases have keys [B, Q, C] here, of which only T exist in the
        first one, so that shapes do not depend on whether there is a memory.
        """
        query = self._with_encoding(feature, encoding)
        residual = query if self.config.decoupled else feature
        own_value = query if self.config.decoupled else feature
        T, Q = remembered.shape[1], feature.shape[1]
        if T == 0:
            return self.fc_after(layer(query, query, own_value, mask, residual))
        key, value = self._with_encoding(remembered, remembered_encoding), self.fc_before(remembered)
        key, value = (nn.functional.pad(x, (0, 0, 0, Q - T)) for x in (key, value))
        missing = (torch.arange(Q, device=feature.device) >= T)[None, None]  # [1, 1, K]
        has_memory = exists[:, None, None]
        hidden = missing & has_memory  # not `where`, which ONNX Runtime does not have for bool
        if mask is not None:
            hidden = hidden | (mask & ~has_memory)
        keys = torch.where(has_memory, key, query), torch.where(has_memory, value, own_value)
        return self.fc_after(layer(query, *keys, hidden, residual))

    def _with_encoding(self, feature: Tensor, encoding: Tensor) -> Tensor:
        return torch.cat([feature, encoding], -1) if self.config.decoupled else feature + encoding


def box_head(config: Sparse4DConfig) -> SparseHead:
    """Builds the head for boxes."""
    head, C = config.boxes, config.channels
    bank = InstanceBank(
        head, initial_boxes(head.anchors), C, partial(move_boxes, swaps_yaw=head.swaps_yaw),
        stores_scale=True, learns_feature=False,
    )  # fmt: skip
    return SparseHead(
        config, head, BoxEncoder(head), partial(BoxKeyPoints, head, C), partial(BoxRefinement, head, C), bank
    )


def line_head(config: Sparse4DConfig, head: LineHeadConfig) -> SparseHead:
    """Builds the head for lines."""
    C = config.channels
    bank = InstanceBank(head, initial_lines(head), C, move_lines, stores_scale=False, learns_feature=True)
    return SparseHead(
        config, head, LineEncoder(head, C), partial(LineKeyPoints, head, C), partial(LineRefinement, head, C), bank
    )
