"""MapTRv2's lift for one fixed rig: the sum over the image features of each BEV cell, with static shapes.

Which features fall into which cell depends on the calibration alone. With a fixed rig the scatter of the published lift
becomes a gather: the features of each cell are listed once, and lists of about the same length are read together. The
gates of the depth net, which depend on the calibration too, become constants. Every operator is native to TensorRT.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from perception.models.maptrv2.config import MapTRv2Config
from perception.models.maptrv2.encoder import LiftSplat, camera_parameters
from perception.types import CameraRig


class FixedLiftSplat(nn.Module):
    """`LiftSplat` of one rig, for a batch of one frame.

    Args:
        lift: in evaluation mode; its modules are shared.
        rig: leading [1, N], all cameras present, with their poses on the vehicle.
        ego_from_lidar: [1, 4, 4].
        image_size: height and width in pixels of the images that the rig is calibrated for.
        feature_size: height and width of the feature maps.
    """

    context_gate: Tensor
    depth_gate: Tensor
    cell_of_list: Tensor

    @torch.no_grad()
    def __init__(
        self,
        lift: LiftSplat,
        rig: CameraRig,
        ego_from_lidar: Tensor,
        image_size: tuple[int, int],
        feature_size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.config: MapTRv2Config = lift.config
        self.depth_net, self.downsample = lift.depth_net, lift.downsample
        cameras = camera_parameters(rig, self.config.image_scale).flatten(0, 1)
        context_gate, depth_gate = lift.depth_net.gates(cameras)
        self.register_buffer("context_gate", context_gate, persistent=False)  # [N, C, 1, 1]
        self.register_buffer("depth_gate", depth_gate, persistent=False)
        index, inside = lift.cells(rig, ego_from_lidar, image_size, feature_size)  # [1, N, D, h, w]
        _, N, D, h, w = index.shape
        points = inside.flatten().nonzero()[:, 0]  # in the order of the published sum
        cells, lists, lengths = torch.unique(index.flatten()[points], return_inverse=True, return_counts=True)
        order = lists.argsort(stable=True)
        points, place = points[order], torch.arange(len(points)) - (lengths.cumsum(0) - lengths)[lists[order]]
        n, pixel = points // (D * h * w), points % (h * w)
        sizes = torch.tensor([1 << math.ceil(math.log2(length)) for length in lengths.tolist()], dtype=torch.int64)
        self.sizes = sorted(set(sizes.tolist()))  # of lists, filled up to powers of two
        rank = torch.zeros_like(cells)  # of a cell's list among all lists, which are ordered by size
        done = 0
        for size in self.sizes:
            chosen = sizes == size
            rank[chosen] = done + torch.arange(int(chosen.sum()))
            done += int(chosen.sum())
            # The last probability is an added zero.
            probability = torch.full((len(cells), size), N * D * h * w)
            context = torch.zeros_like(probability)
            mine = chosen[lists[order]]
            probability[lists[order][mine], place[mine]] = points[mine]
            context[lists[order][mine], place[mine]] = (n * h * w + pixel)[mine]
            self.register_buffer(f"probability_{size}", probability[chosen], persistent=False)  # [lists, size]
            self.register_buffer(f"context_{size}", context[chosen], persistent=False)
        rows, columns = (side * self.config.splat_scale for side in self.config.bev)
        cell_of_list = torch.full((rows * columns,), len(cells))  # the last list is an added zero
        cell_of_list[cells] = rank
        self.register_buffer("cell_of_list", cell_of_list, persistent=False)

    def forward(self, features: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes image features as BEV features.

        Args:
            features: [1, N, C, h, w].
            present: [1, N] bool.

        Returns:
            BEV features [1, C, rows, columns], depth logits [1, N, D, h, w].
        """
        C = features.shape[2]
        depth_logits, context = self.depth_net.gated(features[0], self.context_gate, self.depth_gate)
        probability = depth_logits.float().softmax(1) * present[0, :, None, None, None]  # [N, D, h, w]
        probability = torch.cat([probability.flatten(), probability.new_zeros(1)]).to(context.dtype)
        context = context.permute(0, 2, 3, 1).flatten(0, 2)  # [N * h * w, C]
        sums = []
        for size in self.sizes:
            which, pixel = self.get_buffer(f"probability_{size}"), self.get_buffer(f"context_{size}")
            weight = probability.index_select(0, which.flatten()).view(-1, 1, size)
            sums.append(weight @ context.index_select(0, pixel.flatten()).view(-1, size, C))  # [lists, 1, C]
        lists = torch.cat([*(part[:, 0] for part in sums), context.new_zeros(1, C)])
        rows, columns = (side * self.config.splat_scale for side in self.config.bev)
        splat = lists.index_select(0, self.cell_of_list).view(1, rows, columns, C).permute(0, 3, 1, 2)
        return self.downsample(splat), depth_logits[None]
