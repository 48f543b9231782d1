"""The instance memory of Sparse4D and SparseDrive: the best instances of the previous frame, with their ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.models.sparse4d.config import HeadConfig

Move = Callable[[Tensor, Tensor, Tensor], Tensor]  # anchors, now_from_prev, seconds -> anchors


class InstanceMemory(NamedTuple):
    """What is remembered of a frame: T instances by descending confidence."""

    feature: Tensor  # [B, T, C]
    anchor: Tensor  # [B, T, D] in the LiDAR frame of that frame
    confidence: Tensor  # [B, T] 0..1
    ids: Tensor  # [B, T] int32, -1 for none
    next_id: Tensor  # [B, 1] int32, the first id that has not been given; the same for the whole batch


class Motion(NamedTuple):
    """What happened since the previous frame."""

    now_from_prev: Tensor  # [B, 4, 4] between the LiDAR frames, metres
    seconds: Tensor  # [B]
    is_first: Tensor  # [B] bool, True where there is no memory


class Recalled(NamedTuple):
    """The memory, moved to the present frame."""

    memory: InstanceMemory  # its anchors moved by their velocity and by the ego motion
    exists: Tensor  # [B] bool, False where the memory must be ignored
    fresh: Tensor  # [B] bool, True where it is young enough to replace new instances
    interval: Tensor  # [B] seconds for the refinement of velocities


class InstanceBank(nn.Module):
    """The anchors that each frame starts with, and the rules of the memory.

    Args:
        config: of the head.
        anchor: [Q, D] initial anchors.
        channels: of the instances.
        move: moves anchors to the present frame.
        stores_scale: the checkpoints hold a constant that is not used (`anchor_handler.fix_scale`).
        learns_feature: the initial features are learned, not zero.
    """

    def __init__(
        self,
        config: HeadConfig,
        anchor: Tensor,
        channels: int,
        move: Move,
        *,
        stores_scale: bool,
        learns_feature: bool,
    ) -> None:
        super().__init__()
        self.config, self.move = config, move
        self.anchor = nn.Parameter(anchor)
        self.instance_feature = nn.Parameter(torch.zeros(len(anchor), channels), requires_grad=learns_feature)
        if learns_feature:
            nn.init.xavier_uniform_(self.instance_feature)
        if stores_scale:
            self.anchor_handler = nn.Module()
            self.anchor_handler.fix_scale = nn.Parameter(torch.zeros(1, 3), requires_grad=False)

    def empty(self, batch_size: int) -> InstanceMemory:
        """Returns the memory of a first frame."""
        zeros, T = self.anchor.new_zeros, self.config.remembered
        C, D = self.instance_feature.shape[1], self.anchor.shape[1]
        return InstanceMemory(
            feature=zeros(batch_size, T, C),
            anchor=zeros(batch_size, T, D),
            confidence=zeros(batch_size, T),
            ids=torch.full((batch_size, T), -1, dtype=torch.int32, device=self.anchor.device),
            next_id=zeros(batch_size, min(T, 1), dtype=torch.int32),
        )

    def recall(self, memory: InstanceMemory, motion: Motion) -> Recalled:
        """Moves the memory to the present frame.

        As published, a memory that is too old is moved, too, and instances attend to it; it only does not replace new
        instances.
        """
        config = self.config
        seconds = motion.seconds.float()
        exists = ~motion.is_first & (config.remembered > 0)
        fresh = exists & (seconds.abs() <= config.max_interval)
        interval = torch.where(fresh & (seconds != 0), seconds, config.default_interval)
        anchor = self.move(memory.anchor.float(), motion.now_from_prev.float(), seconds)
        return Recalled(memory._replace(anchor=anchor), exists, fresh, interval)

    def take_over(self, feature: Tensor, anchor: Tensor, logits: Tensor, recalled: Recalled) -> tuple[Tensor, Tensor]:
        """Replaces instances by those of the memory, where it is fresh: T of the memory, then the best new ones.

        Args:
            feature: [B, Q, C].
            anchor: [B, Q, D].
            logits: [B, Q, K] of the classes.
            recalled: the memory.

        Returns:
            Feature and anchor of the same shapes.
        """
        if self.config.remembered == 0:
            return feature, anchor
        memory = recalled.memory
        best = logits.amax(-1).topk(logits.shape[1] - self.config.remembered, dim=1).indices
        kept = (x.gather(1, best[..., None].expand(-1, -1, x.shape[-1])) for x in (feature, anchor))
        new_feature, new_anchor = (torch.cat(pair, 1) for pair in zip(memory[:2], kept, strict=True))
        fresh = recalled.fresh[:, None, None]
        return torch.where(fresh, new_feature, feature), torch.where(fresh, new_anchor, anchor)

    def confidence(self, logits: Tensor, recalled: Recalled) -> Tensor:
        """Returns the confidence of each instance [B, Q] for logits [B, Q, K].

        The instances in the places of the memory have at least its confidence times the decay; as published by
        Sparse4D also after a pause, where they are other instances.
        """
        counts = recalled.exists if self.config.keeps_confidence else recalled.fresh
        before = torch.where(counts[:, None], recalled.memory.confidence, 0.0) * self.config.confidence_decay
        score = logits.float().amax(-1).sigmoid()
        T = self.config.remembered
        return torch.cat([torch.maximum(before, score[:, :T]), score[:, T:]], 1)

    def identify(self, recalled: Recalled, count: int) -> tuple[Tensor, Tensor]:
        """Gives ids to `count` instances: those of the memory keep theirs, others get new ones.

        As published, every instance has an id, and new ids are numbered over the whole batch. Without a memory there
        are no ids.

        Returns:
            Ids [B, count] int32, -1 for none, and the next free id [B, 1] int32.
        """
        memory, T = recalled.memory, self.config.remembered
        if T == 0:
            return torch.full((len(memory.ids), count), -1, dtype=torch.int32, device=memory.ids.device), memory.next_id
        # Every remembered instance has an id, so what is new follows from the places alone, without counting.
        kept = recalled.fresh.int()[:, None] * T  # [B, 1]
        new = count - kept
        earlier = torch.ones(len(new), len(new), dtype=torch.int32, device=new.device).tril(-1)
        start = memory.next_id[:1] + (earlier * new.T).sum(1, keepdim=True, dtype=torch.int32)
        place = torch.arange(count, dtype=torch.int32, device=new.device)
        ids = torch.where(place < kept, F.pad(memory.ids, (0, count - T)), start + place - kept)
        return ids, memory.next_id + new.sum(0, keepdim=True, dtype=torch.int32)

    def remember(
        self, feature: Tensor, anchor: Tensor, logits: Tensor, recalled: Recalled
    ) -> tuple[Tensor, InstanceMemory]:
        """Returns the ids of all instances [B, Q] and the memory for the next frame, without gradients."""
        ids, next_id = self.identify(recalled, logits.shape[1])
        confidence, best = self.confidence(logits.detach(), recalled).topk(self.config.remembered, dim=1)
        kept_feature, kept_anchor = (
            x.detach().gather(1, best[..., None].expand(-1, -1, x.shape[-1])) for x in (feature, anchor)
        )
        return ids, InstanceMemory(kept_feature, kept_anchor, confidence, ids.gather(1, best), next_id)
